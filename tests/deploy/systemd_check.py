"""What is wrong with the systemd unit, its drop-in for GPUs, its user and its settings."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import tempfile
from pathlib import Path

from tests.conftest import BIN
from tests.deploy.shared import (
    ENDING_S,
    SECRET_NAME,
    command_problems,
    config_of,
    output_of,
    read_settings,
    seconds,
    settings_problems,
    yaml_problems,
)

FOLDER = "deploy/systemd"
UNIT = f"{FOLDER}/packhorse.service"
CUDA = f"{FOLDER}/cuda.conf"
USERS = f"{FOLDER}/sysusers.conf"
SETTINGS = f"{FOLDER}/packhorse.yaml"
INSTALLED = "/opt/packhorse/bin/packhorse"
# In tenths, as `systemd-analyze security` takes them; docs/deploy.md says what is left open.
EXPOSURE = 15
CUDA_EXPOSURE = 16
# What the unit must have whatever its exposure is in all.
REQUIRED = {
    "Restart": "on-failure", "RestartPreventExitStatus": "2", "NoNewPrivileges": "yes",
    "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes", "PrivateDevices": "yes",
    "StateDirectory": "packhorse", "CacheDirectory": "packhorse", "CapabilityBoundingSet": "",
}  # fmt: skip
# The engine does not work with it; see the unit.
REFUSED = {"MemoryDenyWriteExecute": "yes", "ProcSubset": "pid", "PrivateNetwork": "yes"}


def check_systemd(root: Path) -> list[str]:
    problems = [*yaml_problems(root / SETTINGS),
                *settings_problems(root / SETTINGS, listens="127.0.0.1")]  # fmt: skip
    lines = _lines(root / UNIT)
    return [
        *problems,
        *_analyzed(root),
        *_unit(root, dict(lines), lines),
        *_users(root, dict(lines)),
        *_cuda(root),
    ]


def _lines(path: Path) -> list[tuple[str, str]]:
    """Names and values, in their order; some are given more than once."""
    found = re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE)
    return [(name, value.strip()) for name, value in found]


def _analyzed(root: Path) -> list[str]:
    """systemd's own word, with the drop-in and without."""
    problems = []
    for drop_in, limit in ((False, EXPOSURE), (True, CUDA_EXPOSURE)):
        with tempfile.TemporaryDirectory() as folder:
            unit = Path(folder) / "packhorse.service"
            # It wants to see the program, which is not installed here.
            program = shutil.which("packhorse", path=BIN) or "/bin/true"
            unit.write_text((root / UNIT).read_text().replace(INSTALLED, program))
            if drop_in:
                (Path(folder) / "packhorse.service.d").mkdir()
                shutil.copy(root / CUDA, Path(folder) / "packhorse.service.d/cuda.conf")
            code, text = output_of("systemd-analyze", "verify", "--man=no", unit)
            ours = [
                line for line in text.splitlines() if "packhorse" in line or "cuda.conf" in line
            ]
            problems += [f"verify: {line.replace(folder, '')}" for line in ours]
            if code and not ours:
                problems.append(f"verify: {text}")
            code, text = output_of("systemd-analyze", "security", "--offline=yes", "--no-pager",
                                   f"--threshold={limit}", unit)  # fmt: skip
            if code:
                said = text.strip().rpartition("\n")[2]
                problems.append(f"exposure is above {limit / 10}: {said}")
    return problems


def _unit(root: Path, values: dict[str, str], lines: list[tuple[str, str]]) -> list[str]:
    problems = [f"{name} is not {value!r}" for name, value in REQUIRED.items()
                if values.get(name) != value]  # fmt: skip
    problems += [f"{name}={value}: the engine does not bear it" for name, value in REFUSED.items()
                 if values.get(name) == value]  # fmt: skip
    words = shlex.split(values.get("ExecStart", ""))
    if not words or words[0] != INSTALLED:
        return [*problems, f"ExecStart does not run {INSTALLED}"]
    problems += command_problems(words[1:])
    if config_of(words) != f"/etc/packhorse/{Path(SETTINGS).name}":
        problems.append(f"ExecStart reads {config_of(words)}, not {Path(SETTINGS).name}")
    if values.get("User", "root") in {"root", "0"}:
        problems.append("it runs as root")
    for name, value in lines:
        variable = value.partition("=")[0]
        if name == "Environment" and SECRET_NAME.search(variable):
            problems.append(f"{variable} is for all to read")
    settings, _ = read_settings(root / SETTINGS)
    if settings is None:
        return problems
    stop_s = seconds(values.get("TimeoutStopSec", "90"))
    if stop_s < settings.service.drain_timeout_s + ENDING_S:
        problems.append(f"TimeoutStopSec {stop_s:g} is too short for the drain")
    store = settings.adapters.store
    if store is None or not store.is_relative_to("/var/lib/packhorse"):
        problems.append(f"the adapter store {store} is not in the StateDirectory")
    if "/home" in f"{settings.model} {settings.adapters.folder} {settings.auth.keys_file}":
        problems.append("ProtectHome hides what is in /home")
    return problems


def _users(root: Path, values: dict[str, str]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        # Of another root, or it would pass over a user that is here already.
        (Path(folder) / "etc").mkdir()
        code, text = output_of("systemd-sysusers", "--dry-run", f"--root={folder}", root / USERS)
    if code:
        return [f"sysusers: {text.strip()}"]
    if f"Would create user '{values.get('User')}'" not in text.replace("Creating", "Would create"):
        return [f"sysusers: does not make the user {values.get('User')}: {text.strip()}"]
    return []


def _cuda(root: Path) -> list[str]:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read(root / CUDA)
    problems = []
    if not parser.has_section("Service") or parser.get("Service", "PrivateDevices") != "no":
        problems.append("cuda.conf: PrivateDevices hides the GPU")
    allowed = [value for name, value in _lines(root / CUDA) if name == "DeviceAllow"]
    if not allowed or any(not value.startswith("char-nvidia") for value in allowed):
        problems.append("cuda.conf: not NVIDIA's devices, and no others")
    return problems
