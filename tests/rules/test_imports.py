"""Import directions, held by reading every import statement. Rooms are folders; see
docs/structure.md.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools import rooms

FILES = sorted([*(ROOT / "serve").rglob("*.py"), *(ROOT / "quantize").rglob("*.py")])
LEAVES = {"serve.messages", "serve.errors", "serve.metrics", "serve.telemetry.logs"}
# The protocols that requests are served by; concrete ones are chosen where a server is built.
PROTOCOLS = {"serve.adapters.base", "serve.cache.base", "serve.engines.base", "serve.routing.base"}
# What a front end (HTTP, gRPC) may know.
BEHIND = {
    "serve.access", "serve.adapters.base", "serve.api", "serve.limits", "serve.service",
    "serve.settings", "serve.stream", "serve.telemetry",
}  # fmt: skip

# room or module -> what of ours it may import, besides itself and what lies below it
ALLOWED: dict[str, set[str]] = {
    "serve.messages": set(),
    "serve.errors": set(),
    "serve.metrics": {"serve.errors", "serve.telemetry.machine"},
    "serve.telemetry": {"serve.messages", "serve.settings"},
    "serve.settings": {"serve.errors"},
    "serve.tenancy": set(),
    "serve.ignored": {"serve.metrics"},
    "serve.access": LEAVES | {"serve.settings"},
    "serve.limits": LEAVES | {"serve.settings"},
    "serve.engines.vllm.patches": LEAVES | {"serve.engines.base", "serve.engines.processes"},
    "serve.engines": LEAVES | {"serve.settings"},
    "serve.adapters": LEAVES,
    "serve.routing": LEAVES,
    "serve.cache": LEAVES | {"serve.tenancy"},
    "serve.models": LEAVES | PROTOCOLS,
    "serve.sources": LEAVES
    | PROTOCOLS
    | {"serve.cache.single_flight", "serve.limits", "serve.telemetry"},
    "serve.stream": LEAVES
    | PROTOCOLS
    | {
        "serve.cache.single_flight", "serve.ignored", "serve.limits", "serve.sources",
        "serve.telemetry",
    },
    "serve.service": LEAVES
    | PROTOCOLS
    | {
        "serve.cache.key", "serve.limits", "serve.models", "serve.sources", "serve.stream",
        "serve.telemetry", "serve.tenancy",
    },
    "serve.api": LEAVES | PROTOCOLS | {"serve.cache.key", "serve.ignored", "serve.stream"},
    "serve.rest": LEAVES | BEHIND,
    "serve.rpc": LEAVES | BEHIND | {"serve.routing.base"},
    "serve.signals": {"serve.engines.processes"},
    "serve.engine_builder": {
        "serve.adapters", "serve.cache", "serve.engines", "serve.errors", "serve.settings",
    },
    "serve.cli": LEAVES | {"serve.access", "serve.settings", "serve.app"},
    "quantize.errors": set(),
    "quantize.settings": set(),
    "quantize.numerics": set(),
    "quantize.model": {"quantize.errors"},
    "quantize.formats": {"quantize.errors", "quantize.numerics"},
    "quantize.report.plots": {"quantize.errors"},
    "quantize.report.verdict": set(),
    "quantize.report.inspect": {"quantize.model"},
    "quantize.output.shards": set(),
    "quantize.output.workspace": {"quantize.errors", "quantize.model", "quantize.output.shards"},
    "quantize.quality.evaluate": {"quantize.errors"},
    "quantize.calibration": {"quantize.errors", "quantize.model", "quantize.quality.evaluate"},
}  # fmt: skip

# library -> the only places that may import it
ONLY_IN = {
    "fastapi": ("serve.rest",),
    "starlette": ("serve.rest",),
    "grpc": ("serve.rpc",),
    "grpc_health": ("serve.rpc.public",),
    "grpc_reflection": ("serve.rpc.public",),
    "google": ("serve.rpc",),
    "vllm": ("serve.engines.vllm", "quantize.quality.engine_check"),
    "matplotlib": ("quantize.report.plots",),
    "prometheus_client": ("serve.metrics", "serve.telemetry.machine", "serve.engines.vllm"),
    "opentelemetry": ("serve.telemetry.tracing",),
    "pynvml": ("serve.telemetry.machine",),
    "uvicorn": ("serve.rest.server", "serve.rest.connections"),
    "yaml": ("serve.access.keys", "serve.routing"),
    "sklearn": ("serve.routing",),
    "redis": ("serve.cache.redis",),
    "aiomcache": ("serve.cache.memcached",),
}


def module_of(path: Path) -> str:
    return rooms.module_of(path, ROOT)


@cache  # several rules ask for the same file
def imports_of(path: Path) -> frozenset[str]:
    return frozenset(rooms.imports_of(path, ROOT))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_follow_the_design(path: Path) -> None:
    module = module_of(path)
    ours = {name for name in imports_of(path) if within(name, "serve") or within(name, "quantize")}
    other = "quantize" if within(module, "serve") else "serve"
    assert not {name for name in ours if within(name, other)}, "the stages meet on disk only"
    package = next((name for name in ALLOWED if within(module, name)), None)
    if package is not None:
        allowed = ALLOWED[package] | {package}
        wrong = {name for name in ours if not any(within(name, place) for place in allowed)}
        assert not wrong
    tops = {"serve.app": "serve.cli", "quantize.run": "quantize.cli"}
    assert not {name for name in ours if name in tops and module != tops[name]}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_ours_are_imported_by_their_full_names(path: Path) -> None:
    """`from serve import errors` would be a second copy of the module, where it is found at all."""
    text = path.read_text()
    assert "\nfrom serve" not in text
    assert "\nfrom quantize" not in text
    assert "from ." not in text, "relative imports hide where things live"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    module = module_of(path)
    for library, places in ONLY_IN.items():
        if any(within(name, library) for name in imports_of(path)):
            assert any(within(module, place) for place in places), f"{library} in {module}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_settings_reads_the_environment(path: Path) -> None:
    # The others hand on, or read, what vLLM itself reads there.
    others = {
        "serve.engines.vllm.patches.forkserver", "quantize.plan.host",
        "quantize.quality.engine_check",
    }  # fmt: skip
    if module_of(path) not in {"serve.settings", *others}:
        text = path.read_text()
        assert "os.environ" not in text
        assert "getenv" not in text


def test_grid_knows_torch_only() -> None:
    assert imports_of(ROOT / "quantize/numerics/grid.py") <= {
        "__future__",
        "collections.abc",
        "dataclasses",
        "torch",
    }
