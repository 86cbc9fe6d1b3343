"""Engines by name. Each is imported only when chosen, so the echo engine needs neither vllm nor
torch.
"""

from __future__ import annotations

from collections.abc import Callable

from serve.engines.base import Engine
from serve.engines.folder import model_folder
from serve.settings import EngineSettings


def _vllm(model: str, name: str, settings: EngineSettings) -> Engine:
    folder = model_folder(model)
    from serve.engines.vllm.engine import VllmEngine

    return VllmEngine(folder, name, settings)


def _echo(model: str, name: str, settings: EngineSettings) -> Engine:
    from serve.engines.echo import EchoEngine

    return EchoEngine(settings)


# name -> build(model folder, served name, settings). Building vLLM's takes half a minute: do it in
# a worker thread.
ENGINES: dict[str, Callable[[str, str, EngineSettings], Engine]] = {"vllm": _vllm, "echo": _echo}
