"""The CPU's one worker in the process of the engine core: one process less, no messages between the
two, and the CPU that vLLM keeps free for the second is used.

vLLM has such an executor for GPUs, and replaces it on a CPU by a second process, since it sets
OpenMP's environment for the worker alone. Ours sets torch's threads instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import vllm.envs
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list
from vllm.utils.torch_utils import available_cpu_count
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from packhorse.serve.engines.vllm.patches import probing
from packhorse.serve.engines.vllm.patches.forkserver import chosen_threads

NAME = "in_process_executor"
KIND = "speed"
APPLIES_TO = {
    "vllm.v1.executor.uniproc_executor": {
        "UniProcExecutor._init_executor": "sha256:b52846d051ae2a1e",
    },
    "vllm.utils.cpu_resource_utils": {
        "get_allowed_cpu_list": "call()",
        "LogicalCPUInfo": "names: physical_core numa_node",
    },
    "vllm.utils.torch_utils": {
        "available_cpu_count": "call()",
    },
    "vllm.envs": {
        "": "names: VLLM_CPU_NUM_OF_RESERVED_CPU VLLM_CPU_OMP_THREADS_BIND is_set",
    },
}
WITHOUT = "The engine has a second process for its worker, and its steps take longer."


def probe(root: Path | None = None) -> str | None:
    return probing.reason(APPLIES_TO, root)


def is_possible(settings: dict[str, Any]) -> bool:
    """Whether there is one worker, and vLLM need not bind its threads to CPUs, as it must on
    several memory nodes, or because the user says so. `settings` are the engine's that vLLM alone
    knows.
    """
    several = {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"}
    return (
        all(settings.get(name) in (None, 1) for name in several)
        and not settings.get("kv_transfer_config")
        and not vllm.envs.is_set("VLLM_CPU_OMP_THREADS_BIND")
        and len({cpu.numa_node for cpu in get_allowed_cpu_list()}) == 1
    )


class InProcessCPUExecutor(UniProcExecutor):
    """One thread a core; as vLLM does, none for one core, which the server needs."""

    def _init_executor(self) -> None:
        cores = len({cpu.physical_core for cpu in get_allowed_cpu_list()})
        cores = min(cores, available_cpu_count())  # less with a container's limit
        reserved = vllm.envs.VLLM_CPU_NUM_OF_RESERVED_CPU
        kept = 1 if reserved is None else reserved
        torch.set_num_threads(chosen_threads() or max(1, cores - kept))
        super()._init_executor()
