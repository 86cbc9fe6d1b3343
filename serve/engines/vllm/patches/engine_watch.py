"""What tells whether an engine gets on: its processes, and whether it has work. health.py judges.

vLLM's own health check knows of deaths alone: it stays green while an engine hangs.
"""

from __future__ import annotations

from pathlib import Path

import psutil
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from packhorse.serve.engines.vllm.patches import probing

NAME = "engine_watch"
KIND = "speed"
APPLIES_TO = {
    "vllm.v1.engine.async_llm": {
        "AsyncLLM.__init__": "names: output_processor engine_core",
    },
    "vllm.v1.engine.output_processor": {
        "OutputProcessor.has_unfinished_requests": "sha256:24824b03e3da197b",
        "OutputProcessor.propagate_error": "sha256:fa2fc88985117f81",
    },
    "vllm.v1.engine.core_client": {
        "AsyncMPClient._call_utility_async": "sha256:1b3a074e9ac4e399",
        "MPClient.__init__": "names: utility_results resources engine_manager",
    },
    "vllm.v1.engine.utils": {
        "CoreEngineProcManager.__init__": "names: processes",
    },
}
WITHOUT = "An engine that hangs is not noticed; one that dies is."


def probe(root: Path | None = None) -> str | None:
    return probing.reason(APPLIES_TO, root)


class EngineWatch:
    """Of one engine."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._requests = llm.output_processor
        self._calls = llm.engine_core.utility_results  # futures of what else the core was asked
        self.cores = [
            psutil.Process(process.pid)
            for process in llm.engine_core.resources.engine_manager.processes
        ]

    def has_work(self) -> bool:
        """Whether the engine has requests, or calls to answer."""
        return bool(self._requests.has_unfinished_requests() or self._calls)

    def fail_callers(self) -> None:
        """End all requests and calls with EngineDeadError. vLLM tells its callers of an engine's
        death, but not of an end that it was asked for; and never those that wait for a reply, as
        the first requests do.
        """
        self._requests.propagate_error(EngineDeadError())
        for reply in self._calls.values():
            if not reply.done():
                reply.set_exception(EngineDeadError())
