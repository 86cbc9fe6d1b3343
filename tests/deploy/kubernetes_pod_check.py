"""What is wrong with the server's pods."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from packhorse.serve.settings import Settings
from tests.deploy.shared import (
    ENDING_S,
    PINNED,
    SECRET_NAME,
    command_problems,
    config_of,
    read_settings,
    settings_problems,
)

HEALTH = {"startupProbe": "/health/live", "livenessProbe": "/health/live",
          "readinessProbe": "/health/ready"}  # fmt: skip
GROUP = 10001  # the image's


def check_pod(
    server: dict[str, Any],
    settings_map: dict[str, Any],
    accounts: list[dict[str, Any]],
) -> list[str]:
    pod = server["spec"]["template"]["spec"]
    container = pod["containers"][0]
    problems = [*_confined(pod, container), *_resources(container), *_volumes(server, container)]
    if pod.get("enableServiceLinks", True):
        problems.append("enableServiceLinks: PACKHORSE_PORT would end the server at its start")
    tokens = [pod, *(each for each in accounts)]
    if any(each.get("automountServiceAccountToken", True) for each in tokens):
        problems.append("the pod has a token for the cluster")
    if pod.get("serviceAccountName") not in {each["metadata"]["name"] for each in accounts}:
        problems.append("the pod's ServiceAccount is not there")
    if not PINNED.fullmatch(container["image"]):
        problems.append(f"image {container['image']} is not pinned")
    for each in container.get("env", []):
        if SECRET_NAME.search(each["name"]) and "value" in each:
            problems.append(f"secret {each['name']} is in the manifest")
    settings, said = _settings(settings_map, container)
    problems += said
    if settings is not None:
        problems += _follows(settings, server, container)
    return problems


def _settings(
    settings_map: dict[str, Any], container: dict[str, Any]
) -> tuple[Settings | None, list[str]]:
    """The ConfigMap's settings, by the server's own loader; and the command that reads them."""
    problems = command_problems(container["args"])
    config = config_of(container["args"]) or "/"
    name = Path(config).name
    if name not in settings_map["data"]:
        return None, [*problems, f"reads {config}, which is not in the ConfigMap"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(settings_map["data"][name])
        problems += settings_problems(path)
        return read_settings(path)[0], problems


def _follows(settings: Settings, server: dict[str, Any], container: dict[str, Any]) -> list[str]:
    """What the manifest says of the server that its settings decide."""
    pod = server["spec"]["template"]["spec"]
    problems = []
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    wanted = {"http": settings.http.port, "grpc": settings.rpc.port,
              "admin": settings.http.admin_port}  # fmt: skip
    if ports != wanted:
        problems.append(f"ports {ports} are not those of the settings, {wanted}")
    if settings.http.admin_host != "0.0.0.0" or settings.rpc.host != "0.0.0.0":
        problems.append("a port listens where nobody reaches it")
    for name, path in HEALTH.items():
        asked = container.get(name, {}).get("httpGet", {})
        if asked.get("path") != path or asked.get("port") != "http":
            problems.append(f"{name} does not ask {path} on port http")
    start = container.get("startupProbe", {})
    if start.get("periodSeconds", 10) * start.get("failureThreshold", 3) < 120:
        problems.append("startupProbe: too short for slow imports")
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    if sleep[:1] != ["sleep"]:
        problems.append("no preStop: requests that still come in a rollout would get 503")
        sleep = ["sleep", "0"]
    grace_s = pod.get("terminationGracePeriodSeconds", 30)
    if grace_s < float(sleep[1]) + settings.service.drain_timeout_s + ENDING_S:
        problems.append(f"terminationGracePeriodSeconds {grace_s} is too short for the drain")
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    paths = (settings.model, settings.adapters.folder, settings.adapters.store,
             settings.auth.keys_file, config_of(container["args"]))  # fmt: skip
    for path in filter(None, paths):
        if not any(Path(path).is_relative_to(mount) for mount in mounts):
            problems.append(f"{path} is on no volume")
    state = mounts.get("/var/lib/packhorse", {}).get("name")
    claims = {each["metadata"]["name"]: each["spec"]
              for each in server["spec"].get("volumeClaimTemplates", [])}  # fmt: skip
    store = settings.adapters.store
    if store is None or state not in claims or not store.is_relative_to("/var/lib/packhorse"):
        problems.append("the adapter store is not on a volume of each pod's own")
    elif claims[state]["accessModes"] != ["ReadWriteOnce"]:
        problems.append("the adapter store's volume may be shared, which a store does not bear")
    return problems


def _confined(pod: dict[str, Any], container: dict[str, Any]) -> list[str]:
    wanted = {"runAsNonRoot": True, "runAsUser": GROUP, "runAsGroup": GROUP, "fsGroup": GROUP,
              "seccompProfile": {"type": "RuntimeDefault"}}  # fmt: skip
    given = pod.get("securityContext", {})
    problems = [f"securityContext.{name} is not {value}" for name, value in wanted.items()
                if given.get(name) != value]  # fmt: skip
    wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
              "capabilities": {"drop": ["ALL"]}}  # fmt: skip
    given = container.get("securityContext", {})
    problems += [f"securityContext.{name} is not {value}" for name, value in wanted.items()
                 if given.get(name) != value]  # fmt: skip
    problems += [f"{name} is given" for name in ("privileged", "runAsUser") if name in given]
    problems += [f"{name} is on" for name in ("hostNetwork", "hostPID", "hostIPC")
                 if pod.get(name)]  # fmt: skip
    return problems


def _resources(container: dict[str, Any]) -> list[str]:
    resources = container.get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    problems = []
    if "memory" not in limits or limits["memory"] != requests.get("memory"):
        problems.append("memory: no limit, or not the request's")
    if "cpu" not in requests:
        problems.append("no cpu is requested")
    threads = {each["name"]: each.get("value") for each in container.get("env", [])}
    if "cpu" in limits:
        given = threads.get("OMP_NUM_THREADS")
        if given is None or not 1 <= int(given) < int(limits["cpu"]):
            problems.append("OMP_NUM_THREADS is not below the cpu limit: threads would be stopped")
    if container["image"].endswith("-cuda") != ("nvidia.com/gpu" in limits):
        problems.append("the CUDA image and a GPU go together")
    return problems


def _volumes(server: dict[str, Any], container: dict[str, Any]) -> list[str]:
    volumes = {each["name"]: each for each in server["spec"]["template"]["spec"]["volumes"]}
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    problems = []
    for path, mount in mounts.items():
        volume = volumes.get(mount["name"], {})
        if "subPath" in mount:
            problems.append(f"{path}: a subPath never changes with its Secret or ConfigMap")
        if "hostPath" in volume:
            problems.append(f"{path} is the node's")
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            problems.append(f"{path} has no limit")
        shared = volume.keys() & {"secret", "configMap", "persistentVolumeClaim"}
        if shared and not mount.get("readOnly"):
            problems.append(f"{path} may be written to")
    for path in ("/tmp", "/dev/shm"):
        if "emptyDir" not in volumes.get(mounts.get(path, {}).get("name"), {}):
            problems.append(f"{path} is not writable, or too small")
    for name, volume in volumes.items():
        mode = volume.get("secret", {}).get("defaultMode", 0o440)
        if mode & 0o007:
            problems.append(f"{name}: others may read it")
    retention = server["spec"].get("persistentVolumeClaimRetentionPolicy", {})
    if retention.get("whenScaled") != "Delete":
        problems.append("whenScaled: an old store would bring removed adapters back")
    return problems
