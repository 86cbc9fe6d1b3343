"""vLLM's CPU worker, allowed to use AMX. Runs in vLLM's own child process, see arguments.py."""

from __future__ import annotations

import torch
from vllm.v1.worker.cpu_worker import CPUWorker


class AmxWorker(CPUWorker):
    """Linux ends a process with SIGILL when it uses AMX tiles without having asked for them. oneDNN
    asks, at its first large product; vLLM's attention kernel does not. So with plain vLLM 0.32 an
    engine whose first prompt is a few tokens long dies of it (docs/lab-log.md).
    """

    def init_device(self) -> None:
        torch.cpu._init_amx()  # does nothing where there is no AMX
        super().init_device()
