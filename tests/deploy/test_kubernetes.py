"""The manifests, as kustomize builds them: Debian's old one (kubectl 1.20) or a new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.deploy.kubernetes_check import FOLDER, check_kubernetes
from tests.deploy.shared import Breakage, assert_reported, cases, copies, needs

pytestmark = needs("kubectl")

BASE = f"{FOLDER}/base"
SERVER = f"{BASE}/statefulset.yaml"
SERVICES = f"{BASE}/services.yaml"
SETTINGS = f"{BASE}/packhorse.yaml"
MAKE = f"{BASE}/kustomization.yaml"
ACCOUNT = f"{BASE}/serviceaccount.yaml"
SPACE = f"{BASE}/namespace.yaml"
BUDGET = f"{BASE}/poddisruptionbudget.yaml"
POLICY = f"{BASE}/networkpolicy.yaml"
CPU, CPU_MAKE = f"{FOLDER}/overlays/cpu/server.yaml", f"{FOLDER}/overlays/cpu/kustomization.yaml"
CUDA, CUDA_MAKE = (
    f"{FOLDER}/overlays/cuda/server.yaml",
    f"{FOLDER}/overlays/cuda/kustomization.yaml",
)
MONITOR = f"{FOLDER}/monitoring/servicemonitor.yaml"
MONITOR_MAKE = f"{FOLDER}/monitoring/kustomization.yaml"
SCALED = f"{FOLDER}/autoscaling/scaledobject.yaml"
SCALED_MAKE = f"{FOLDER}/autoscaling/kustomization.yaml"
KEYS_MOUNT = "{name: keys, mountPath: /etc/packhorse/keys, readOnly: true}"
KEYS_SUBPATH = (
    "{name: keys, mountPath: /etc/packhorse/keys/keys.yaml, subPath: keys.yaml, readOnly: true}"
)
SECRET_IN_ENV = "env:\n            - {name: HF_TOKEN, value: abc}"

BREAKAGES = cases(
    ("bad-yaml", SERVER, "spec:\n  serviceName", "spec\n  serviceName", "could not find expected"),
    ("unknown-field", SERVER, "podManagementPolicy", "podManagmentPolicy", "podManagmentPolicy"),
    ("wrong-type", SERVER, "periodSeconds: 10", "periodSeconds: ten", "StatefulSet packhorse"),
    ("root", SERVER, "runAsUser: 10001", "runAsUser: 0", "runAsUser is not 10001"),
    ("may-be-root", SERVER, "runAsNonRoot: true", "runAsNonRoot: false", "runAsNonRoot"),
    ("writable-root", SERVER, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false",
     "readOnlyRootFilesystem"),
    ("capabilities", SERVER, "capabilities: {drop: [ALL]}", "capabilities: {add: [SYS_ADMIN]}",
     "capabilities"),
    ("no-seccomp", SERVER, "seccompProfile: {type: RuntimeDefault}",
     "seccompProfile: {type: Unconfined}", "seccompProfile"),
    ("token", SERVER, "automountServiceAccountToken: false", "automountServiceAccountToken: true",
     "token"),
    ("account-token", ACCOUNT, "automountServiceAccountToken: false",
     "automountServiceAccountToken: true", "token"),
    ("service-links", SERVER, "enableServiceLinks: false", "enableServiceLinks: true",
     "PACKHORSE_PORT would end the server"),
    ("short-grace", SERVER, "GracePeriodSeconds: 60", "GracePeriodSeconds: 30", "too short"),
    ("long-drain", SETTINGS, "drain_timeout_s: 30 ", "drain_timeout_s: 90 ", "too short"),
    ("live-path", SERVER, "path: /health/live", "path: /healthz", "livenessProbe does not ask"),
    ("ready-is-live", SERVER, "path: /health/ready", "path: /health/live", "readinessProbe does"),
    ("no-start-probe", SERVER, "failureThreshold: 60", "failureThreshold: 2", "too short for slow"),
    ("no-pre-stop", SERVER, "[sleep, \"5\"]", "[\"true\"]", "no preStop"),
    ("keys-subpath", SERVER, KEYS_MOUNT, KEYS_SUBPATH, "a subPath never changes"),
    ("keys-for-all", SERVER, "defaultMode: 0440", "defaultMode: 0444", "others may read it"),
    ("keys-renamed", SERVER, "secretName: packhorse-keys", "secretName: keys", "docs/deploy.md"),
    ("models-writable", SERVER, "mountPath: /models, readOnly: true", "mountPath: /models",
     "/models may be written to"),
    ("no-shm", SERVER, "            - {name: shm, mountPath: /dev/shm}\n", "", "/dev/shm is not"),
    ("tmp-unbounded", SERVER, "emptyDir: {sizeLimit: 2Gi}", "emptyDir: {}", "/tmp has no limit"),
    ("shared-store", SERVER, "ReadWriteOnce", "ReadWriteMany", "a store does not bear"),
    ("old-stores", SERVER, "whenScaled: Delete", "whenScaled: Retain", "removed adapters back"),
    ("replicas", SERVER, "  serviceName:", "  replicas: 2\n  serviceName:", "undo the autoscaler"),
    ("flag", SERVER, "--config, ", "--konfig, ", "No such option"),
    ("other-port", SERVER, "containerPort: 9000", "containerPort: 9001", "not those of the"),
    ("selector", SERVER, "matchLabels: {app.kubernetes.io/name: packhorse}\n  #",
     "matchLabels: {app.kubernetes.io/name: pack}\n  #", "does not select the pods"),
    ("setting", SETTINGS, "admin_host", "admin_hots", "http.admin_hots"),
    ("no-keys", SETTINGS, "auth:\n  keys_file: /etc/packhorse/keys/keys.yaml\n", "", "everybody"),
    ("store-nowhere", SETTINGS, "/var/lib/packhorse/adapters", "/tmp/adapters", "each pod's own"),
    ("lone-admin", SETTINGS, "admin_host: 0.0.0.0", "admin_host: 127.0.0.1", "nobody reaches"),
    ("missing-file", MAKE, "  - networkpolicy.yaml\n", "", "no NetworkPolicy"),
    ("misspelt-file", MAKE, "- services.yaml", "- service.yaml", "overlays/cpu"),
    ("a-secret", MAKE, "configMapGenerator:", "secretGenerator:\n  - name: packhorse-keys\n"
     "    literals: [keys.yaml=x]\nconfigMapGenerator:", "do not belong into the repository"),
    ("namespace", SPACE, "enforce: restricted", "enforce: baseline", "the restricted standard"),
    ("budget", BUDGET, "maxUnavailable: 1", "maxUnavailable: 0", "does not let one pod go"),
    ("budget-version", BUDGET, "policy/v1", "policy/v1beta1", "there is no kind"),
    ("admin-for-clients", SERVICES, "{name: grpc, port: 50051, targetPort: grpc, appProtocol",
     "{name: admin, port: 9000, targetPort: admin, appProtocol", "clients reach /admin"),
    ("target-port", SERVICES, "targetPort: admin", "targetPort: metrics", "no port metrics"),
    ("not-headless", SERVICES, "  clusterIP: None\n", "", "not headless"),
    ("policy-open", POLICY, "    - from:\n        - namespaceSelector:\n            matchLabels: "
     "{packhorse-client: \"true\"}\n      ports:", "    - ports:", "lets everybody in"),
    ("policy-all", POLICY, "- namespaceSelector:\n            matchLabels: "
     "{packhorse-client: \"true\"}", "- namespaceSelector: {}", "lets everybody in"),
    ("policy-port", POLICY, "port: 9000", "port: 9090", "not the settings' ports"),
    ("threads", CPU, 'value: "7"', 'value: "8"', "threads would be stopped"),
    ("no-memory-limit", CPU, 'cpu: "8", memory: 16Gi}\n            limits',
     'cpu: "8"}\n            limits', "memory: no limit"),
    ("secret-in-env", CPU, "env:", SECRET_IN_ENV, "secret HF_TOKEN is in the manifest"),
    ("latest", CPU_MAKE, "newTag: 0.1.0-cpu ", "newTag: latest ", "not pinned"),
    ("no-gpu", CUDA, ', nvidia.com/gpu: "1"', "", "go together"),
    ("cpu-image", CUDA_MAKE, "0.1.0-cuda", "0.1.0-cpu", "go together"),
    ("monitor-port", MONITOR, "port: admin", "port: http", "has no metrics"),
    ("monitor-path", MONITOR, "path: /metrics", "path: /v1/metrics", "has no metrics"),
    ("monitor-field", MONITOR, "scrapeTimeout", "scrapeTimeOut", "scrapeTimeOut"),
    ("monitor-no-key", MONITOR, "authorization:\n        type: Bearer", "params:\n        a: b",
     "ServiceMonitor"),
    ("monitor-selector", MONITOR, "component: pods", "component: metrics", "selects 0 Services"),
    ("monitor-job", MONITOR, "jobLabel: app.kubernetes.io/name ", "jobLabel: app ", "jobLabel"),
    ("monitor-secret", MONITOR, "packhorse-metrics-key", "metrics-key", "docs/deploy.md does not"),
    ("monitor-elsewhere", MONITOR_MAKE, "namespace: packhorse", "namespace: default",
     "not in the namespace"),
    ("metric-name", SCALED, "vllm:num_requests_waiting", "vllm:num_request_waiting",
     "nothing exports vllm:num_request_waiting"),
    ("metric-all", SCALED, 'job="packhorse",', "", "not about our pods alone"),
    ("scale-target", SCALED, "kind: StatefulSet", "kind: Deployment", "which is not there"),
    ("scale-to-one", SCALED, "minReplicaCount: 2", "minReplicaCount: 1", "fewer than two"),
    ("scale-number", SCALED, 'threshold: "8"', "threshold: 8", "ScaledObject"),
    ("scale-nothing", SCALED_MAKE, "[scaledobject.yaml]", "[]", "no ScaledObject"),
)  # fmt: skip


def test_the_manifests_are_right() -> None:
    assert check_kubernetes(ROOT) == []


@pytest.mark.parametrize(
    "breakages",
    copies(
        BREAKAGES,
        "bad-yaml",
        "unknown-field budget-version monitor-field scale-number",
        "wrong-type monitor-no-key",
        "account-token long-drain store-nowhere a-secret policy-open monitor-port monitor-job",
        "no-start-probe policy-all monitor-path monitor-secret",
        "flag",
        "setting",
        "missing-file scale-nothing",
        "misspelt-file",
        "no-gpu",
        "cpu-image",
    ),
)
def test_a_broken_manifest_is_reported(tmp_path: Path, breakages: list[Breakage]) -> None:
    assert_reported(check_kubernetes, tmp_path, breakages)
