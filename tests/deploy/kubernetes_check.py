"""What is wrong with the manifests, as kustomize builds them."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

from packhorse.serve import metrics
from packhorse.serve.rest.middleware import scope_of
from tests.deploy.kubernetes_pod_check import check_pod
from tests.deploy.kubernetes_schemas import CUSTOM
from tests.deploy.shared import output_of, read_settings, yaml_problems

FOLDER = "deploy/kubernetes"
OVERLAYS = ("overlays/cpu", "overlays/cuda")
EXTRAS = ("monitoring", "autoscaling")
VERSION = "1.33"
Resource = dict[str, Any]


def check_kubernetes(root: Path) -> list[str]:
    folder = root / FOLDER
    problems = [each for path in sorted(folder.rglob("*.yaml")) for each in yaml_problems(path)]
    if problems:
        return problems
    extras, said = _built(folder, EXTRAS)
    problems += said
    for overlay in OVERLAYS:
        if problems:  # the next would mostly say the same
            break
        base, problems = _built(folder, (overlay,))
        resources = base + extras
        problems += [each for one in resources for each in _schema_problems(one)]
        if not problems:
            problems += [f"{overlay}: {each}" for each in _whole(root, resources)]
    return problems


def _built(folder: Path, names: tuple[str, ...]) -> tuple[list[Resource], list[str]]:
    """What kustomize makes of these folders."""
    found, problems = [], []
    for name in names:
        parts = [folder / name, *([folder / "base"] if name in OVERLAYS else [])]
        content = tuple(
            (str(path.relative_to(folder)), path.read_text())
            for part in parts
            for path in sorted(part.glob("*.yaml"))
        )
        code, text = _kustomized(name, content)
        if code:
            problems.append(f"{name}: {text[-500:]}")
        else:
            found += [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]
    return found, problems


@cache  # a broken copy differs in one file, and most folders do not have it
def _kustomized(name: str, content: tuple[tuple[str, str], ...]) -> tuple[int, str]:
    with tempfile.TemporaryDirectory() as folder:
        for path, text in content:
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_text(text)
        code, text = output_of("kubectl", "kustomize", Path(folder) / name)
    # Warnings about words that old ones need come on the same screen.
    return code, re.sub(r"^# Warning: .*\n", "", text, flags=re.MULTILINE)


def _schema_problems(resource: Resource) -> list[str]:
    return _judged(json.dumps(resource))


@cache
def _judged(text: str) -> list[str]:
    resource = json.loads(text)
    kind = resource["kind"]
    if kind in CUSTOM:
        faults = Draft202012Validator(CUSTOM[kind]).iter_errors(resource)
        return [f"{kind}: {each.json_path}: {each.message}" for each in faults]
    try:
        kubernetes_validate.validate(resource, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{kind} {resource['metadata']['name']}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"there is no kind {resource.get('apiVersion')} {kind}"]
    return []


def _whole(root: Path, resources: list[Resource]) -> list[str]:
    def of(kind: str) -> list[Resource]:
        return [each for each in resources if each["kind"] == kind]

    kinds = ("Namespace", "ServiceAccount", "ConfigMap", "StatefulSet", "Service",
             "PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor", "ScaledObject")  # fmt: skip
    missing = [kind for kind in kinds if not of(kind)]
    if missing:
        return [f"no {kind}" for kind in missing]
    problems = []
    if of("Secret"):
        problems.append("a Secret: keys do not belong into the repository")
    namespace = of("Namespace")[0]["metadata"]
    if namespace["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
        problems.append("the namespace does not enforce the restricted standard")
    for each in resources:
        if each is not of("Namespace")[0] and each["metadata"].get("namespace") != "packhorse":
            problems.append(f"{each['kind']} is not in the namespace packhorse")
    server = of("StatefulSet")[0]
    problems += check_pod(server, of("ConfigMap")[0], of("ServiceAccount"))
    problems += _selected(server, resources)
    problems += _services(server, of("Service"))
    problems += _monitor(of("Service"), of("ServiceMonitor")[0])
    problems += _scaling(server, of("ScaledObject")[0])
    problems += _network(root, of("NetworkPolicy")[0])
    budget = of("PodDisruptionBudget")[0]["spec"]
    if budget.get("maxUnavailable") != 1:
        problems.append("the disruption budget does not let one pod go, and one only")
    problems += _documented(root, resources)
    return problems


def _matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()


def _selected(server: Resource, resources: list[Resource]) -> list[str]:
    labels = server["spec"]["template"]["metadata"]["labels"]
    selectors = {"StatefulSet": "selector", "PodDisruptionBudget": "selector",
                 "NetworkPolicy": "podSelector"}  # fmt: skip
    return [
        f"{each['kind']} does not select the pods"
        for each in resources
        if each["kind"] in selectors
        and not _matches(each["spec"][selectors[each["kind"]]].get("matchLabels", {}), labels)
    ]


def _services(server: Resource, services: list[Resource]) -> list[str]:
    spec = server["spec"]["template"]
    ports = {port["name"] for port in spec["spec"]["containers"][0]["ports"]}
    problems = []
    for each in services:
        name = each["metadata"]["name"]
        if not _matches(each["spec"]["selector"], spec["metadata"]["labels"]):
            problems.append(f"Service {name} does not select the pods")
        unknown = {port["targetPort"] for port in each["spec"]["ports"]} - ports
        problems += [f"Service {name}: the pods have no port {port}" for port in unknown]
    by_name = {each["metadata"]["name"]: each["spec"] for each in services}
    if by_name.get(server["spec"]["serviceName"], {}).get("clusterIP") != "None":
        problems.append("the StatefulSet's Service is not there, or not headless")
    if any(port["name"] == "admin" for port in by_name.get("packhorse", {"ports": []})["ports"]):
        problems.append("clients reach /admin and /metrics")
    return problems


def _monitored(services: list[Resource], monitor: Resource) -> list[Resource]:
    wanted = monitor["spec"]["selector"]["matchLabels"]
    return [each for each in services if _matches(wanted, each["metadata"]["labels"])]


def _monitor(services: list[Resource], monitor: Resource) -> list[str]:
    found = _monitored(services, monitor)
    if len(found) != 1:
        return [f"the ServiceMonitor selects {len(found)} Services, not one"]
    problems = []
    ports = {port["name"]: port["targetPort"] for port in found[0]["spec"]["ports"]}
    for endpoint in monitor["spec"]["endpoints"]:
        if ports.get(endpoint["port"]) != "admin":
            problems.append(f"the ServiceMonitor's port {endpoint['port']} has no metrics")
        if scope_of(endpoint["path"]) != "metrics":
            problems.append(f"{endpoint['path']} has no metrics")
    label = monitor["spec"].get("jobLabel", "")
    if found[0]["metadata"]["labels"].get(label) != "packhorse":
        problems.append("jobLabel: the job is not named packhorse, as rules and dashboard have it")
    if not found[0]["spec"].get("publishNotReadyAddresses"):
        problems.append("pods that load are not scraped")
    return problems


@cache
def exported_metrics() -> frozenset[str]:
    """Names of ours, and of the vLLM that is installed; without importing it, which takes long."""
    names = set(re.findall(r'"(packhorse_\w+)"', Path(metrics.__file__).read_text()))
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        text = (Path(folder) / "v1/metrics/loggers.py").read_text()
        names |= set(re.findall(r'"(vllm:\w+)"', text))
    return frozenset(names)


def _scaling(server: Resource, scaled: Resource) -> list[str]:
    spec = scaled["spec"]
    target = spec["scaleTargetRef"]
    problems = []
    if (target["kind"], target["name"]) != (server["kind"], server["metadata"]["name"]):
        problems.append(f"scales {target['kind']} {target['name']}, which is not there")
    if "replicas" in server["spec"]:
        problems.append("replicas in the manifest: applying it would undo the autoscaler's")
    if not 2 <= spec["minReplicaCount"] <= spec["maxReplicaCount"]:
        problems.append("fewer than two replicas: a node's drain would end the service")
    for trigger in spec["triggers"]:
        query = trigger["metadata"]["query"]
        for name in re.findall(r"\b[a-z_]+:\w+|\bpackhorse_\w+", query):
            if name not in exported_metrics():
                problems.append(f"nothing exports {name}")
        if "vllm:num_requests_waiting{" not in query:
            problems.append("does not scale on vllm:num_requests_waiting")
        if 'job="packhorse"' not in query or 'namespace="packhorse"' not in query:
            problems.append("the query is not about our pods alone")
    return problems


def _network(root: Path, policy: Resource) -> list[str]:
    settings, _ = read_settings(root / FOLDER / "base/packhorse.yaml")
    if settings is None:
        return []
    spec = policy["spec"]
    problems = []
    if set(spec["policyTypes"]) != {"Ingress", "Egress"}:
        problems.append("the NetworkPolicy leaves one direction open")
    open_ports: set[int] = set()
    for rule in spec["ingress"]:
        sources = rule.get("from", [])
        if not sources or {"namespaceSelector": {}} in sources or not rule.get("ports"):
            problems.append("the NetworkPolicy lets everybody in")
        numbers = {port["port"] for port in rule.get("ports", [])}
        if settings.http.admin_port in numbers and len(numbers) > 1:
            problems.append("the NetworkPolicy opens /admin to clients")
        open_ports |= numbers
    wanted = {settings.http.port, settings.http.admin_port, settings.rpc.port}
    if open_ports != wanted:
        problems.append(f"the NetworkPolicy opens {sorted(open_ports)}, not the settings' ports")
    return problems


def _documented(root: Path, resources: list[Resource]) -> list[str]:
    """What operators must make is in docs/deploy.md by its name and the names of its keys."""
    text = (root / "docs/deploy.md").read_text()
    wanted = set()
    for each in resources:
        if each["kind"] == "ServiceMonitor":
            for endpoint in each["spec"]["endpoints"]:
                key = endpoint["authorization"]["credentials"]
                wanted.add(f"secret generic {key['name']} --from-file={key['key']}=")
        if each["kind"] == "StatefulSet":
            for volume in each["spec"]["template"]["spec"]["volumes"]:
                if secret := volume.get("secret"):
                    wanted.add(f"secret generic {secret['secretName']} --from-file=keys.yaml")
                if claim := volume.get("persistentVolumeClaim"):
                    wanted.add(f"PersistentVolumeClaim `{claim['claimName']}`")
    return [f"docs/deploy.md does not say {each!r}" for each in sorted(wanted) if each not in text]
