"""vLLM's CPU worker with the patches that belong into the worker's process. vLLM imports it there
by name, see arguments.py.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from packhorse.serve.engines.vllm.patches import amx, reason
from packhorse.serve.engines.vllm.patches.forkserver import die_with_parent


class PatchedCPUWorker(CPUWorker):
    """Installs `amx` and `cpu_lora_math` before the device is there. What needs one that does not
    fit was refused in the server's process.
    """

    def init_device(self) -> None:
        if reason(amx.NAME) is None:
            amx.install()
        if reason("cpu_lora_math") is None:
            # Not above: what it derives from may be missing where it does not fit.
            from packhorse.serve.engines.vllm.patches import cpu_lora_math

            cpu_lora_math.install()
        # Where the worker is a process of its own: the core, its parent, ends with the server. It
        # notices by itself, but not while it is stopped.
        die_with_parent()
        super().init_device()
