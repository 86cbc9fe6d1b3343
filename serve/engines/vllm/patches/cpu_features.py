"""What this CPU can do, as vLLM's build tells it."""

from __future__ import annotations

import torch
from vllm.platforms import CpuArchEnum, current_platform


def without_avx512() -> bool:
    """Whether this is an x86 CPU on which vLLM takes its build for AVX2."""
    x86 = current_platform.get_cpu_architecture() == CpuArchEnum.X86
    return current_platform.is_cpu() and x86 and not torch.cpu._is_avx512_supported()


def has_amx() -> bool:
    """Whether this is a CPU with AMX tiles, and vLLM's build is for CPUs."""
    return current_platform.is_cpu() and bool(torch.cpu._is_amx_tile_supported())
