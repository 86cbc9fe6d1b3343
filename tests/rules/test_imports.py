"""The import directions of the design, held by reading every import statement."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = sorted([*(ROOT / "serve").rglob("*.py"), *(ROOT / "quantize").rglob("*.py")])
LEAVES = {"serve.messages", "serve.errors", "serve.metrics", "serve.logs"}

# package (or module) -> what of ours it may import, besides itself and what lies below it
ALLOWED: dict[str, set[str]] = {
    "serve.messages": LEAVES,
    "serve.errors": LEAVES,
    "serve.metrics": LEAVES | {"serve.machine"},
    "serve.logs": LEAVES,
    "serve.machine": set(),
    "serve.timeline": LEAVES,
    "serve.ignored": {"serve.metrics"},
    "serve.tracing": LEAVES | {"serve.sections"},
    "serve.hosts": set(),
    "serve.outbound": set(),
    "serve.sections": LEAVES | {"serve.hosts", "serve.outbound"},
    "serve.exposure": LEAVES | {"serve.hosts", "serve.sections"},
    "serve.settings": LEAVES | {"serve.sections"},
    "serve.engines": LEAVES | {"serve.sections"},
    "serve.admission": LEAVES | {"serve.bodies", "serve.sections"},
    "serve.bodies": LEAVES,
    "serve.auth": LEAVES | {"serve.sections"},
    "serve.deadline": LEAVES,
    "serve.tenancy": set(),
    "serve.routing": LEAVES,
    "serve.cache": LEAVES | {"serve.tenancy"},
    "serve.sources": LEAVES
    | {
        "serve.adapters.base",
        "serve.admission",
        "serve.cache.singleflight",
        "serve.engines.base",
        "serve.timeline",
    },
    "serve.stream": LEAVES
    | {
        "serve.adapters.base",
        "serve.cache.singleflight",
        "serve.deadline",
        "serve.engines.base",
        "serve.ignored",
        "serve.sources",
        "serve.timeline",
    },
    "serve.models": LEAVES | {"serve.adapters.base", "serve.routing.base"},
    "serve.service": LEAVES
    | {
        "serve.adapters.base",
        "serve.admission",
        "serve.cache.base",
        "serve.cache.key",
        "serve.engines.base",
        "serve.models",
        "serve.routing.base",
        "serve.sources",
        "serve.stream",
        "serve.tenancy",
        "serve.timeline",
    },
    "serve.adapters": LEAVES,
    "serve.admin": LEAVES
    | {"serve.adapters.base", "serve.cache.base", "serve.cache.key", "serve.routing.base"},
    "serve.schema": LEAVES | {"serve.ignored"},
    "serve.answers": LEAVES | {"serve.stream"},
    "serve.rpc": LEAVES
    | {
        "serve.adapters.base",
        "serve.admin",
        "serve.answers",
        "serve.auth",
        "serve.exposure",
        "serve.bodies",
        "serve.routing.base",
        "serve.schema",
        "serve.sections",
        "serve.service",
        "serve.stream",
        "serve.tracing",
    },
    "serve.rest": LEAVES
    | {
        "serve.adapters.base",
        "serve.admin",
        "serve.answers",
        "serve.auth",
        "serve.exposure",
        "serve.bodies",
        "serve.schema",
        "serve.sections",
        "serve.service",
        "serve.stream",
        "serve.tracing",
    },
    "serve.cli": LEAVES | {"serve.auth", "serve.settings", "serve.main"},
    "quantize.errors": set(),
    "quantize.settings": set(),
    "quantize.grid": set(),
    "quantize.families": {"quantize.errors"},
    "quantize.checkpoint": {"quantize.errors"},
    "quantize.evaluate": {"quantize.errors"},
    "quantize.inputs": set(),
    "quantize.blocks": {
        "quantize.checkpoint",
        "quantize.errors",
        "quantize.experts",
        "quantize.families",
        "quantize.hooks",
        "quantize.inputs",
        "quantize.shelf",
        "quantize.walk",
    },
    "quantize.walk": {"quantize.checkpoint", "quantize.families"},
    "quantize.experts": set(),
    "quantize.hooks": set(),
    "quantize.shelf": set(),
    "quantize.shards": set(),
    "quantize.plots": {"quantize.errors"},
    "quantize.verdict": set(),
    "quantize.workspace": {"quantize.checkpoint", "quantize.errors", "quantize.shards"},
    "quantize.calibration": {"quantize.checkpoint", "quantize.errors", "quantize.evaluate"},
    "quantize.methods": {
        "quantize.grid",
        "quantize.families",
        "quantize.errors",
        "quantize.inputs",
    },
    "quantize.formats": {"quantize.grid", "quantize.errors"},
    "quantize.inspect": {"quantize.checkpoint"},
}

# library -> the only places that may import it
ONLY_IN = {
    "fastapi": ("serve.rest",),
    "starlette": ("serve.rest",),
    "grpc": ("serve.rpc",),
    "grpc_health": ("serve.rpc.open",),
    "grpc_reflection": ("serve.rpc.open",),
    "google": ("serve.rpc",),
    "vllm": ("serve.engines.vllm", "quantize.verify"),
    "matplotlib": ("quantize.plots",),
    "prometheus_client": ("serve.metrics", "serve.machine", "serve.engines.vllm"),
    "opentelemetry": ("serve.tracing",),
    "pynvml": ("serve.machine",),
    "uvicorn": ("serve.rest.listen", "serve.rest.connections"),
    "yaml": ("serve.auth", "serve.routing"),
    "sklearn": ("serve.routing",),
    "redis": ("serve.cache.redis",),
    "aiomcache": ("serve.cache.memcached",),
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache  # several rules ask for the same file
def imports_of(path: Path) -> frozenset[str]:
    """Modules named in import statements; `from serve import errors` counts as serve.errors."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where things live"
            assert node.module is not None
            for alias in node.names:
                inner = ROOT / Path(*node.module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return frozenset(found)


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
    assert not {name for name in ours if name in {"serve.main", "quantize.run"}} or module in {
        "serve.cli", "quantize.cli",
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    module = module_of(path)
    for library, places in ONLY_IN.items():
        if any(within(name, library) for name in imports_of(path)):
            assert any(within(module, place) for place in places), f"{library} in {module}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_settings_reads_the_environment(path: Path) -> None:
    # The others hand on, or read, what vLLM itself reads there.
    others = {"serve.engines.vllm.nursery", "quantize.host", "quantize.verify"}
    if module_of(path) not in {"serve.settings", *others}:
        text = path.read_text()
        assert "os.environ" not in text
        assert "getenv" not in text


def test_grid_knows_torch_only() -> None:
    assert imports_of(ROOT / "quantize/grid.py") <= {
        "__future__",
        "collections.abc",
        "dataclasses",
        "torch",
    }
