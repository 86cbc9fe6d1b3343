"""vLLM's CPU worker, mended in three places, and at home in the core's own process. Runs in vLLM's
own children, see arguments.py.
"""

from __future__ import annotations

import torch
import vllm.envs
from packhorse.serve.engines.vllm.patches.cpu_lora_math import MaskedLora
from packhorse.serve.engines.vllm.patches.forkserver import chosen_threads, die_with_parent
from vllm.lora.layers import base_linear
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list
from vllm.utils.torch_utils import available_cpu_count
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker.cpu_worker import CPUWorker

LORA_MATH = f"{MaskedLora.__module__}.{MaskedLora.__qualname__}"  # vLLM imports it by name


class MendedWorker(CPUWorker):
    """Linux ends a process with SIGILL when it uses AMX tiles without having asked for them. oneDNN
    asks, at its first large product; vLLM's attention kernel does not. So with plain vLLM 0.32 an
    engine whose first prompt is a few tokens long dies of it (docs/lab-log.md).

    Without AMX, W8A8 layers keep their weight in oneDNN only, and vLLM 0.32's LoRA layers, which
    ask it for its device, do not start on them.

    What adapters add is worked out by lora_math.py.
    """

    def init_device(self) -> None:
        torch.cpu._init_amx()  # does nothing where there is no AMX
        base_linear._get_lora_device = lambda layer: torch.device("cpu")
        type(current_platform).get_punica_wrapper = classmethod(lambda _: LORA_MATH)
        # Where the worker is a process of its own: the core, its parent, ends with the server. It
        # notices by itself, but not while it is stopped.
        die_with_parent()
        super().init_device()


class InCore(UniProcExecutor):
    """vLLM has this for GPUs, and replaces it on a CPU by a second process, since it sets OpenMP's
    environment for the worker alone. Ours asks torch for the threads instead: one a core, and, as
    vLLM does, none for one core, which the server needs.
    """

    def _init_executor(self) -> None:
        cores = len({cpu.physical_core for cpu in get_allowed_cpu_list()})
        cores = min(cores, available_cpu_count())  # less with a container's limit
        reserved = vllm.envs.VLLM_CPU_NUM_OF_RESERVED_CPU
        kept = 1 if reserved is None else reserved
        torch.set_num_threads(chosen_threads() or max(1, cores - kept))
        super()._init_executor()
