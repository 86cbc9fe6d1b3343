"""The compose files. Docker Compose itself is not needed: the specification's schema and what the
services expect of each other are checked.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.deploy.compose_check import COMPOSE, CUDA, EXAMPLE, SETTINGS, check_compose
from tests.deploy.shared import Breakage, assert_reported, cases, copies

PROMETHEUS = "deploy/prometheus/prometheus.yml"
SECRET = "${PACKHORSE_CACHE__SECRET:?set it in .env, see docs/deploy.md}"

BREAKAGES = cases(
    ("bad-yaml", COMPOSE, "services:\n", "services\n", "could not find expected ':'"),
    ("unknown-key", COMPOSE, "    shm_size:", "    shmsize:", "shmsize"),
    ("twice", COMPOSE, "    shm_size: 1gb\n", "    shm_size: 1gb\n    shm_size: 1gb\n", "dupl"),
    ("latest", COMPOSE, "redis:7.4.2-bookworm", "redis:latest", "not pinned"),
    ("root", COMPOSE, 'user: "999:999"', 'user: "0:0"', "redis: no user, or root"),
    ("writable", COMPOSE, "read_only: true", "read_only: false", "read_only is not True"),
    ("capabilities", COMPOSE, "cap_drop: [ALL]", "cap_drop: [CHOWN]", "cap_drop is not"),
    ("privileged", COMPOSE, "    shm_size:", "    privileged: true\n    shm_size:", "opens the"),
    ("host-network", COMPOSE, "    shm_size:", "    network_mode: host\n    shm_size:", "opens"),
    ("open-port", COMPOSE, "127.0.0.1:9090:9090", "9090:9090", "open to all the network"),
    ("secret-in-file", COMPOSE, SECRET, "0123456789abcdef", "CACHE__SECRET is in the file"),
    ("empty-secret", COMPOSE, SECRET, "${PACKHORSE_CACHE__SECRET:-}", "may be empty"),
    ("flag", COMPOSE, "--config, /etc/packhorse", "--konfig, /etc/packhorse", "No such option"),
    ("other-config", COMPOSE, "./packhorse.yaml:", "./settings.yaml:", "which is not there"),
    ("keys-file", COMPOSE, "./secrets/keys:/etc/packhorse/keys:ro",
     "./secrets/keys/keys.yaml:/etc/packhorse/keys/keys.yaml:ro", "would stay the old one"),
    ("noexec", COMPOSE, "/tmp:exec,", "/tmp:", "/tmp is not writable and executable"),
    ("small-shm", COMPOSE, "    shm_size: 1gb\n", "", "no shm_size"),
    ("short-grace", COMPOSE, "stop_grace_period: 60s", "stop_grace_period: 30s", "too short"),
    ("no-health", COMPOSE, "test: [CMD, redis-cli, ping]", "disable: true", "asks nothing"),
    ("health-path", COMPOSE, "/health/ready]", "/healthz]", "whether the model is loaded"),
    ("other-dockerfile", COMPOSE, "docker/Dockerfile", "docker/Dockerfile.cpu", "is not there"),
    ("redis-outside", COMPOSE, "internal: true", "internal: false", "leads outside"),
    ("no-rules", COMPOSE, "/etc/prometheus/rules.yml:ro", "/rules.yml:ro", "is not mounted"),
    ("no-metrics-key", COMPOSE, "/etc/prometheus/secrets:ro", "/prom:ro", "metrics key"),
    ("no-dashboards", COMPOSE, "/var/lib/grafana/dashboards:ro", "/dash:ro", "none are mounted"),
    ("no-provisioning", COMPOSE, "/etc/grafana/provisioning:ro", "/p:ro", "provisioning is not"),
    ("other-target", PROMETHEUS, "packhorse:8000", "packhorse:8001", "where the server is not"),
    ("build-argument", CUDA, "{BUILD: cuda}", "{BULID: cuda}", "BULID is not the Dockerfile's"),
    ("no-gpu", CUDA, "[gpu]", "[compute]", "no GPU is asked for"),
    ("cpu-image", CUDA, "0.1.0-cuda", "0.1.0-cpu", "not the CUDA build's"),
    ("setting", SETTINGS, "drain_timeout_s", "drain_timeouts", "service.drain_timeouts"),
    ("long-drain", SETTINGS, "drain_timeout_s: 30 ", "drain_timeout_s: 300 ", "too short"),
    ("no-keys", SETTINGS, "auth:\n  keys_file: /etc/packhorse/keys/keys.yaml\n", "", "everybody"),
    ("other-port", SETTINGS, "port: 8000", "port: 8080", "not those of the settings"),
    ("other-store", SETTINGS, "redis://redis:", "redis://cache:", "store cache is not reached"),
    ("model-nowhere", SETTINGS, "/models/model", "/srv/model", "/srv/model is on no volume"),
    ("example-secret", EXAMPLE, "CACHE__SECRET=", "CACHE__SECRET=changeme", "has a value"),
    ("example-old", EXAMPLE, "GRAFANA_PASSWORD=", "GRAFANA_PASS=", "does not name GRAFANA"),
)  # fmt: skip


def test_the_files_are_right() -> None:
    assert check_compose(ROOT) == []


@pytest.mark.parametrize(
    "breakages",
    copies(
        BREAKAGES,
        "bad-yaml",
        "unknown-key",
        "twice",
        "host-network empty-secret other-dockerfile no-rules setting",
        "long-drain no-keys other-port example-secret",
    ),
)
def test_a_broken_file_is_reported(tmp_path: Path, breakages: list[Breakage]) -> None:
    assert_reported(check_compose, tmp_path, breakages)
