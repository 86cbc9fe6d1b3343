"""The systemd unit, by systemd's own tools; nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.deploy.shared import Breakage, assert_reported, cases, copies, needs
from tests.deploy.systemd_check import CUDA, SETTINGS, UNIT, USERS, check_systemd

pytestmark = needs("systemd-analyze")

BREAKAGES = cases(
    ("unknown-name", UNIT, "ProtectClock=", "ProtectClocks=", "'ProtectClocks'"),
    ("no-program", UNIT, "ExecStart=/opt/packhorse/bin/packhorse", "ExecStart=/p", "does not run"),
    ("flag", UNIT, "--config", "--konfig", "No such option"),
    ("other-config", UNIT, "/etc/packhorse/packhorse.yaml", "/etc/p.yaml", "not packhorse.yaml"),
    ("root", UNIT, "User=packhorse", "User=root", "runs as root"),
    ("no-user", UNIT, "User=packhorse\n", "", "runs as root"),
    ("other-user", UNIT, "User=packhorse", "User=horse", "does not make the user horse"),
    ("writable-system", UNIT, "ProtectSystem=strict", "ProtectSystem=no", "ProtectSystem is not"),
    ("capabilities", UNIT, "CapabilityBoundingSet=\n", "", "exposure is above 1.5"),
    ("system-calls", UNIT, "SystemCallFilter=@system-service\n", "", "exposure is above 1.5"),
    ("secret", UNIT, "Environment=HOME=/var/lib/packhorse", "Environment=HF_TOKEN=x", "HF_TOKEN"),
    ("short-stop", UNIT, "TimeoutStopSec=60", "TimeoutStopSec=20", "too short for the drain"),
    ("bad-span", UNIT, "TimeoutStopSec=60", "TimeoutStopSec=sixty", "verify:"),
    ("restart-loop", UNIT, "RestartPreventExitStatus=2\n", "", "RestartPreventExitStatus is not"),
    ("no-jit", UNIT, "LockPersonality=yes", "MemoryDenyWriteExecute=yes", "does not bear it"),
    ("no-cpuinfo", UNIT, "ProtectProc=invisible", "ProcSubset=pid", "does not bear it"),
    ("gpu-hidden", CUDA, "PrivateDevices=no", "PrivateDevices=yes", "hides the GPU"),
    ("all-devices", CUDA, "DeviceAllow=char-nvidia rw", "DeviceAllow=block-* rw", "no others"),
    ("cuda-name", CUDA, "LimitMEMLOCK=", "LimitMEMLOCKED=", "LimitMEMLOCKED"),
    ("user-line", USERS, "u packhorse", "x packhorse", "sysusers:"),
    ("user-name", USERS, "u packhorse", "u horse", "does not make the user packhorse"),
    ("bad-yaml", SETTINGS, "http:\n", "http\n", "could not find expected ':'"),
    ("setting", SETTINGS, "keys_file", "key_file", "auth.key_file"),
    ("long-drain", SETTINGS, "drain_timeout_s: 30 ", "drain_timeout_s: 120 ", "too short for the"),
    ("open-host", SETTINGS, "http:\n  host: 127.0.0.1 ", "http:\n  host: 0.0.0.0 ", "http.host is"),
    ("model-at-home", SETTINGS, "/srv/packhorse/model", "/home/me/model", "ProtectHome hides"),
    ("store-nowhere", SETTINGS, "/var/lib/packhorse/", "/srv/packhorse/", "the StateDirectory"),
)  # fmt: skip


def test_the_unit_is_right() -> None:
    assert check_systemd(ROOT) == []


@pytest.mark.parametrize(
    "breakages",
    copies(
        BREAKAGES,
        "flag root secret short-stop no-cpuinfo open-host model-at-home store-nowhere",
        "other-config no-user bad-span setting",
        "system-calls user-line long-drain",
        "user-name",
    ),
)
def test_a_broken_unit_is_reported(tmp_path: Path, breakages: list[Breakage]) -> None:
    assert_reported(check_systemd, tmp_path, breakages)
