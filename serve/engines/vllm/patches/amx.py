"""Ask Linux for AMX tiles before a worker computes anything.

Linux ends a process with SIGILL when it uses AMX tiles without having asked for them. oneDNN asks,
at its first large product; vLLM's attention kernel does not. So with plain vLLM 0.32 an engine
whose first prompt is a few tokens long dies of it (docs/lab-log.md). PatchedCPUWorker calls
`install`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from packhorse.serve.engines.vllm.patches import probing

NAME = "amx"
KIND = "correctness"
APPLIES_TO = {
    "torch.cpu": {
        "_init_amx": "call()",
        "_is_amx_tile_supported": "call()",
    },
    "vllm.v1.worker.cpu_worker": {
        "CPUWorker": "names: Worker init_device",
        "CPUWorker.init_device": "call()",
    },
}
WITHOUT = "An engine on a CPU with AMX may die of its first prompt, if that is short."


def probe(root: Path | None = None) -> str | None:
    return probing.reason(APPLIES_TO, root)


def install() -> None:
    """Without effect where there is no AMX."""
    torch.cpu._init_amx()
