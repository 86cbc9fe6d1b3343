"""Engines by name. Each is imported only when chosen, so the echo engine needs neither vllm nor
torch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

from packhorse.serve.engines.base import Engine
from packhorse.serve.settings.sections import EngineSettings


def _vllm(model: str, name: str, settings: EngineSettings) -> Engine:
    from packhorse.serve.engines.vllm.patches import forkserver

    forkserver.start()  # it imports while we do
    # What was imported stays: the collector need not look at it again and again, neither now (a
    # sixth of the time) nor later, where it would stop the server for half a second when an engine
    # is rebuilt. An engine itself must stay collectable.
    gc.disable()
    try:
        from packhorse.serve.engines.vllm.engine import VllmEngine
    finally:
        gc.enable()
    if not gc.get_freeze_count():
        gc.freeze()
    return VllmEngine(Path(model), name, settings)


def _echo(model: str, name: str, settings: EngineSettings) -> Engine:
    from packhorse.serve.engines.echo import EchoEngine

    return EchoEngine(settings)


# name -> build(model folder, served name, settings). Building vLLM's takes long: do it in a worker
# thread.
ENGINES: dict[str, Callable[[str, str, EngineSettings], Engine]] = {"vllm": _vllm, "echo": _echo}
