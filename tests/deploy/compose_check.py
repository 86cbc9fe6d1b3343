"""What is wrong with the compose files, and with what they mount."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema import Draft202012Validator

from tests.deploy.shared import (
    ENDING_S,
    PINNED,
    SECRET_NAME,
    command_problems,
    config_of,
    documents,
    read_settings,
    seconds,
    settings_problems,
    yaml_problems,
)
from tools.dockerfile import parse

FOLDER = "deploy/compose"
COMPOSE = f"{FOLDER}/compose.yaml"
CUDA = f"{FOLDER}/cuda.yaml"
SETTINGS = f"{FOLDER}/packhorse.yaml"
EXAMPLE = f"{FOLDER}/env.example"
# What operators make: not in the repository, and not in git.
OPERATORS = "./secrets/"
# What comes from .env.
GIVEN = {"cache": {"secret": "0" * 32}}
VARIABLE = re.compile(r"\$\{(\w+)(?::([?-])([^}]*))?\}")


def check_compose(root: Path) -> list[str]:
    problems = [each for name in (COMPOSE, CUDA, SETTINGS) for each in yaml_problems(root / name)]
    try:
        whole, cuda = documents(root / COMPOSE)[0], documents(root / CUDA)[0]
    except yaml.YAMLError:
        return problems  # told above
    problems += [f"{COMPOSE}: {each.message}" for each in _schema().iter_errors(whole)]
    problems += [f"{CUDA}: {each.message}" for each in _schema().iter_errors(cuda)]
    if problems:
        return problems
    services = whole["services"]
    for name, service in services.items():
        problems += [f"{name}: {each}" for each in _service(root, service)]
    return [
        *problems,
        *_variables(root),
        *_server(root, whole),
        *_cuda(root, cuda),
        *_prometheus(root, whole),
        *_grafana(root, services),
        *_networks(root, whole),
    ]


@cache
def _schema() -> Draft202012Validator:
    """Of the compose specification, as check-jsonschema has it in its wheel."""
    return Draft202012Validator(get_builtin_schema("vendor.compose-spec"))


def _service(root: Path, service: dict[str, Any]) -> list[str]:
    """What holds for all of them."""
    problems = []
    image = service.get("image", "")
    if "test" not in service.get("healthcheck", {"test": ""}):
        problems.append("the health check asks nothing")
    if not PINNED.fullmatch(image):
        problems.append(f"image {image} is not pinned to a whole version")
    wanted = {
        "read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
    }  # fmt: skip
    problems += [f"{key} is not {value}" for key, value in wanted.items()
                 if service.get(key) != value]  # fmt: skip
    for key in ("privileged", "cap_add", "pid", "ipc", "network_mode", "userns_mode", "devices"):
        if key in service:
            problems.append(f"{key} opens the container")
    if "build" not in service and str(service.get("user", "0")).partition(":")[0] in {"0", "root"}:
        problems.append("no user, or root")
    problems += [f"no {key}" for key in ("healthcheck", "mem_limit", "logging", "networks")
                 if key not in service]  # fmt: skip
    problems += [
        f"port {port} is open to all the network"
        for port in service.get("ports", []) if not str(port).startswith("127.0.0.1:")
    ]  # fmt: skip
    for name, value in service.get("environment", {}).items():
        # It must come from .env, and its absence must be an error and not an empty secret.
        if SECRET_NAME.search(name) and not re.fullmatch(r"\$\{\w+:\?[^}]+\}", str(value)):
            problems.append(f"secret {name} is in the file, or may be empty")
    for source, target, mode in _mounts(service):
        if source.startswith((".", "/")):
            inside = (root / FOLDER / source).resolve()
            if not source.startswith(OPERATORS) and not inside.exists():
                problems.append(f"mounts {source}, which is not there")
            if "docker.sock" in source or source.startswith("/"):
                problems.append(f"mounts {source} of the host")
            if mode != "ro":
                problems.append(f"{target} may be written to")
    return problems


def _mounts(service: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(source, target, mode); the short form alone is used."""
    found = []
    for each in service.get("volumes", []):
        parts = VARIABLE.sub("VARIABLE", each).split(":")
        found.append((parts[0], parts[1], parts[2] if len(parts) > 2 else "rw"))
    return found


def _source(service: dict[str, Any], target: str) -> str | None:
    """What is mounted where `target` is, or on a folder above it."""
    for source, where, _ in _mounts(service):
        if where == target:
            return source
        if target.startswith(f"{where}/"):
            return f"{source}/{target.removeprefix(f'{where}/')}"
    return None


def _variables(root: Path) -> list[str]:
    """The example and the files name the same, and it has no values that could be left there."""
    used: dict[str, str] = {}
    for name in (COMPOSE, CUDA):
        text = re.sub(r"(^|\s)#.*", "", (root / name).read_text())
        used |= {found[1]: found[2] or "" for found in VARIABLE.finditer(text)}
    text = (root / EXAMPLE).read_text()
    given = dict(re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", text, re.MULTILINE))
    problems = [f"{EXAMPLE} does not name {name}" for name in used.keys() - given.keys()]
    problems += [
        f"{EXAMPLE} names {name}, which nothing uses" for name in given.keys() - used.keys()
    ]
    return problems + [
        f"{EXAMPLE} has a value for {name}" for name, kind in used.items()
        if kind == "?" and given.get(name)
    ]  # fmt: skip


def _server(root: Path, whole: dict[str, Any]) -> list[str]:
    server = whole["services"]["packhorse"]
    problems = [
        *command_problems(server["command"]),
        *settings_problems(root / SETTINGS, given=GIVEN),
    ]
    build = server["build"]
    if not (root / FOLDER / build["context"] / build["dockerfile"]).is_file():
        problems.append(f"builds {build['dockerfile']}, which is not there")
    config = config_of(server["command"]) or ""
    if _source(server, config) != f"./{Path(SETTINGS).name}":
        problems.append(f"reads {config}, which is not {SETTINGS}")
    settings, _ = read_settings(root / SETTINGS, GIVEN)
    if settings is None:
        return problems
    grace_s = seconds(server.get("stop_grace_period", "10s"))
    if grace_s < settings.service.drain_timeout_s + ENDING_S:
        problems.append(f"stop_grace_period {grace_s:g} s is too short for the drain")
    keys = str(settings.auth.keys_file)
    source = _source(server, keys) or ""
    mounted = [target for _, target, _ in _mounts(server)]
    if not source.startswith(OPERATORS) or keys in mounted:
        problems.append("the folder of the keys file is not mounted; a file would stay the old one")
    for path in (settings.model, settings.adapters.folder, settings.adapters.store):
        if path is not None and _source(server, str(path)) is None:
            problems.append(f"{path} is on no volume")
    if _source(server, "/var/lib/packhorse") != "state":
        problems.append("/var/lib/packhorse is on no volume")
    if not any(re.match(r"/tmp:(.*,)?exec\b", each) for each in server.get("tmpfs", [])):
        problems.append("/tmp is not writable and executable, which torch needs")
    if "shm_size" not in server:
        problems.append("no shm_size: Docker's 64 MB end vLLM's workers")
    if server["healthcheck"]["test"][-1] != "/health/ready":
        problems.append("the health check does not ask whether the model is loaded")
    open_ports = {str(each).rpartition(":")[2] for each in server["ports"]}
    if open_ports != {str(settings.http.port), str(settings.rpc.port)}:
        problems.append(f"ports {sorted(open_ports)} are not those of the settings")
    needed = {"PACKHORSE_CACHE__SECRET"} if settings.cache.store else set()
    return problems + [f"no {name}" for name in needed - server["environment"].keys()]


def _cuda(root: Path, cuda: dict[str, Any]) -> list[str]:
    server = cuda["services"]["packhorse"]
    stages = parse((root / "deploy/docker/Dockerfile").read_text())
    known = {name for stage in stages for each in stage.instructions if each.name == "ARG"
             for name in each.pairs}  # fmt: skip
    problems = [f"build argument {name} is not the Dockerfile's"
                for name in server["build"]["args"].keys() - known]  # fmt: skip
    if not PINNED.fullmatch(server["image"]) or not server["image"].endswith("-cuda"):
        problems.append(f"image {server['image']} is not the CUDA build's")
    devices = server["deploy"]["resources"]["reservations"]["devices"]
    if not any("gpu" in each["capabilities"] for each in devices):
        problems.append("no GPU is asked for")
    return problems


def _prometheus(root: Path, whole: dict[str, Any]) -> list[str]:
    """Its own files are judged elsewhere; here, that it finds them and the server."""
    service = whole["services"]["prometheus"]
    flags = dict(each.partition("=")[::2] for each in service["command"])
    inside = PurePosixPath(flags["--config.file"])
    if _source(service, str(inside)) != "../prometheus/prometheus.yml":
        return [f"Prometheus reads {inside}, which is not ours"]
    config = documents(root / "deploy/prometheus/prometheus.yml")[0]
    problems = []
    for name in config.get("rule_files", []):
        if not str(_source(service, str(inside.parent / name))).startswith("../prometheus/"):
            problems.append(f"Prometheus reads {name}, which is not mounted")
    job = next(each for each in config["scrape_configs"] if each["job_name"] == "packhorse")
    key = os.path.normpath(inside.parent / job["authorization"]["credentials_file"])
    if not str(_source(service, key)).startswith(OPERATORS):
        problems.append(f"the metrics key {key} is not mounted")
    settings, _ = read_settings(root / SETTINGS, GIVEN)
    target = job["static_configs"][0]["targets"][0]
    if settings is not None and target != f"packhorse:{settings.http.port}":
        problems.append(f"Prometheus scrapes {target}, where the server is not")
    return problems


def _grafana(root: Path, services: dict[str, Any]) -> list[str]:
    service = services["grafana"]
    problems = []
    if _source(service, "/etc/grafana/provisioning") != "../grafana/provisioning":
        problems.append("Grafana's provisioning is not mounted")
    provisioning = root / "deploy/grafana/provisioning"
    for path in provisioning.glob("dashboards/*.yml"):
        for provider in documents(path)[0]["providers"]:
            folder = provider["options"]["path"]
            if not str(_source(service, folder)).startswith("../grafana/dashboards"):
                problems.append(f"Grafana reads dashboards from {folder}, where none are mounted")
    for path in provisioning.glob("datasources/*.yml"):
        for source in documents(path)[0]["datasources"]:
            host = urlsplit(source["url"]).hostname
            if host not in services or not _meet(service, services[str(host)]):
                problems.append(f"Grafana asks {source['url']}, which it does not reach")
    return problems


def _networks(root: Path, whole: dict[str, Any]) -> list[str]:
    problems = []
    services, networks = whole["services"], whole["networks"]
    settings, _ = read_settings(root / SETTINGS, GIVEN)
    if settings is not None and settings.cache.store is not None:
        host = urlsplit(settings.cache.store.get_secret_value()).hostname
        if host not in services or not _meet(services["packhorse"], services[str(host)]):
            problems.append(f"the cache's store {host} is not reached")
    for name in services["redis"]["networks"]:
        if not networks[name] or not networks[name].get("internal"):
            problems.append(f"redis has no password, and network {name} leads outside")
    if not _meet(services["packhorse"], services["prometheus"]):
        problems.append("Prometheus does not reach the server")
    return problems


def _meet(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(set(one["networks"]) & set(other["networks"]))
