"""Import directions, held by reading every import statement. Rooms are folders; see
docs/structure.md.
"""

from __future__ import annotations

import re
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
    "serve.access", "serve.adapters.base", "serve.api", "serve.errors", "serve.limits.body_memory",
    "serve.messages", "serve.metrics", "serve.pipeline", "serve.request_context", "serve.settings",
    "serve.telemetry.tracing",
}  # fmt: skip

# room or module -> what of ours it may import, besides itself and what lies below it
ALLOWED: dict[str, set[str]] = {
    "serve.messages": set(),
    "serve.errors": set(),
    "serve.metrics": {"serve.errors", "serve.telemetry.machine"},
    "serve.telemetry.machine": set(),
    "serve.telemetry": {"serve.messages", "serve.settings.tracing"},
    "serve.settings": {"serve.errors"},
    "serve.tenancy": set(),
    "serve.ignored": {"serve.metrics"},
    "serve.access": {"serve.errors", "serve.messages", "serve.metrics", "serve.settings"},
    "serve.limits.deadline": {"serve.errors"},
    "serve.limits": {"serve.errors", "serve.messages", "serve.metrics", "serve.settings.admission"},
    "serve.engines.vllm.patches": LEAVES | {"serve.engines.base", "serve.engines.processes"},
    "serve.engines": LEAVES | {"serve.settings"},
    "serve.adapters": {"serve.errors", "serve.messages", "serve.metrics"},
    "serve.routing": {"serve.errors", "serve.messages", "serve.metrics"},
    "serve.request_context": {"serve.adapters.base", "serve.ignored", "serve.messages",
                              "serve.telemetry.request_timings"},
    "serve.accounting": {"serve.errors", "serve.ignored", "serve.messages", "serve.metrics",
                         "serve.request_context", "serve.telemetry.logs"},
    "serve.cache": {
        "serve.errors", "serve.messages", "serve.metrics", "serve.request_context",
        "serve.tenancy",
    },
    "serve.models": PROTOCOLS | {
        "serve.errors", "serve.limits.admission", "serve.messages", "serve.metrics",
    },
    "serve.pipeline": PROTOCOLS | {
        "serve.accounting", "serve.errors", "serve.limits", "serve.messages", "serve.metrics",
        "serve.models", "serve.request_context", "serve.telemetry.request_timings",
        "serve.tenancy",
    },
    # Its operators' calls are about adapters, routes and the cache; all else is the service's.
    "serve.api.admin": {
        "serve.adapters.base", "serve.api.validation", "serve.cache.base", "serve.cache.key",
        "serve.errors", "serve.messages", "serve.routing.base",
    },
    "serve.api.batches": {
        "serve.api.validation", "serve.batches", "serve.errors", "serve.messages",
    },
    "serve.batches": {
        "serve.errors", "serve.messages", "serve.metrics", "serve.settings.batches",
    },
    "serve.rest.in_process": {"serve.batches.records", "serve.errors", "serve.messages"},
    "serve.rest.openapi": BEHIND | {"serve.batches.records"},
    "serve.api": {
        "serve.errors", "serve.ignored", "serve.messages", "serve.pipeline",
    },
    "serve.rest": BEHIND,
    "serve.rpc": BEHIND,
    "serve.signals": {"serve.engines.processes"},
    "serve.engine_builder": {
        "serve.adapters", "serve.cache", "serve.engines", "serve.errors", "serve.metrics",
        "serve.settings",
    },
    "serve.server": {
        "serve.access.exposure", "serve.app", "serve.engines.processes", "serve.rest.server",
        "serve.rpc.server", "serve.settings", "serve.signals", "serve.telemetry.logs",
    },
    "serve.batch_command": {
        "serve.app", "serve.batches", "serve.engines.processes", "serve.errors", "serve.messages",
        "serve.settings", "serve.signals", "serve.telemetry.logs",
    },
    "serve.batch_remote": {"serve.errors"},
    "serve.cli": {
        "serve.access", "serve.batch_command", "serve.batch_remote", "serve.errors",
        "serve.settings", "serve.server",
    },
    "quantize.errors": set(),
    "quantize.settings": set(),
    "quantize.numerics": set(),
    "quantize.model": {"quantize.errors"},
    "quantize.formats": {"quantize.errors", "quantize.numerics"},
    "quantize.calibration": {"quantize.errors", "quantize.model"},
    "quantize.plan": {
        "quantize.calibration", "quantize.errors", "quantize.formats", "quantize.model",
        "quantize.numerics", "quantize.settings",
    },
    "quantize.methods": {
        "quantize.calibration", "quantize.errors", "quantize.formats", "quantize.model",
        "quantize.numerics", "quantize.plan",
    },
    "quantize.quality": {
        "quantize.calibration", "quantize.errors", "quantize.formats", "quantize.methods",
        "quantize.model", "quantize.numerics", "quantize.plan", "quantize.settings",
    },
    "quantize.output": {
        "quantize.calibration", "quantize.errors", "quantize.formats", "quantize.methods",
        "quantize.model", "quantize.numerics", "quantize.plan",
    },
    "quantize.report": {"quantize.errors", "quantize.model", "quantize.output"},
    "quantize.cli": {"quantize.errors", "quantize.report", "quantize.run", "quantize.settings"},
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
    "python_multipart": ("serve.rest.batches",),
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
    tops = {
        "serve.app": {"serve.server", "serve.batch_command"},
        "serve.server": {"serve.cli"},
        "serve.batch_command": {"serve.cli"},
        "quantize.run": {"quantize.cli"},
    }
    assert not {name for name in ours if name in tops and module not in tops[name]}


def test_sections_of_settings_know_no_other_section() -> None:
    shared = {f"serve.settings.{name}" for name in ("section", "hosts")}
    for path in (ROOT / "serve/settings").glob("*.py"):
        if path.stem not in ("__init__", "renamed"):
            ours = {name for name in imports_of(path) if within(name, "serve")}
            assert not {name for name in ours if not any(within(name, s) for s in shared)}, path


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


@pytest.mark.parametrize("path", sorted((ROOT / "serve/api").glob("*.py")), ids=module_of)
def test_the_api_layer_names_no_protocol(path: Path) -> None:
    """rest and rpc encode what it returns; a word of theirs in it belongs there."""
    words = re.compile(r"\b(fastapi|starlette|grpc|http)\b", re.IGNORECASE)
    lines = path.read_text().splitlines()
    assert not [line for line in lines if words.search(line)]


def test_grid_knows_torch_only() -> None:
    assert imports_of(ROOT / "quantize/numerics/grid.py") <= {
        "__future__",
        "collections.abc",
        "dataclasses",
        "torch",
    }


def test_the_pipeline_names_no_concrete_part() -> None:
    """It works with whatever cache, queue and engine a model was given."""
    text = (ROOT / "serve/pipeline.py").read_text()
    concrete = (
        "ResultCache", "Flight", "Redis", "Memcached", "Registry", "LoraQueue", "Router",
        "Supervisor", "VllmEngine", "EchoEngine", "vllm",
    )  # fmt: skip
    assert not [name for name in concrete if re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("stage", rooms.STAGES)
def test_rooms_make_no_circle(stage: str) -> None:
    assert rooms.circles_of(rooms.arrows_of(stage, ROOT)) == []
