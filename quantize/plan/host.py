"""This machine, and the kernels that vLLM 0.32 has for a scheme, here and on other targets.

Known from /proc/cpuinfo, torch and vLLM's source, not from an engine; quality/engine_check.py asks
the real one. Called by planner.py and run.py.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from packhorse.quantize.numerics.grid import Scheme

MARLIN = (7, 5)
FP8_UNITS = (8, 9)
MACHETE = (9, 0)


@dataclass(frozen=True)
class Host:
    """The machine that quantizes, which need not be the one that serves."""

    amx: bool
    avx512: bool
    avx512_bf16: bool
    cuda_capability: tuple[int, int] | None
    """None: torch sees no CUDA device."""
    flops_per_s: float
    """Speed of float32 matrix products on the CPU."""
    int4_w4a8: bool = True
    """VLLM_CPU_INT4_W4A8: whether vLLM may round the inputs of layers with 4-bit weights."""
    machine: str = "x86_64"


def this_host() -> Host:
    """Read the CPU's flags (none without /proc/cpuinfo), ask torch for CUDA, and time one matrix
    product. Takes about a tenth of a second.
    """
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    square = torch.ones(1024, 1024)
    torch.mm(square, square)  # warm-up: starts threads and fills caches
    started_s = time.perf_counter()
    torch.mm(square, square)
    seconds = max(time.perf_counter() - started_s, 1e-6)
    return Host(
        amx={"amx_tile", "amx_bf16", "amx_int8"} <= flags,
        avx512="avx512f" in flags,
        avx512_bf16="avx512_bf16" in flags,
        cuda_capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        flops_per_s=2 * 1024**3 / seconds,
        int4_w4a8=os.environ.get("VLLM_CPU_INT4_W4A8", "1") != "0",
        machine=os.uname().machine,
    )


def kernel(target: str, scheme: Scheme, dtype: str, host: Host) -> str:
    """The kernel for the quantized layers of a model in `dtype` (safetensors' name)."""
    if target == "cuda":
        return _on_cuda(scheme)
    if scheme.weights.floating:
        return "W8A8 float8, torch's product"
    if scheme.activation_bits == 8:
        return f"W8A8 int8 ({'AMX' if host.amx else 'oneDNN'})"
    if _unpacks(host):
        return "W4A16, unpacked on load on this host (no AVX-512)"
    if not host.amx:
        return "W4A16; on CPUs with AMX W4A8 unless VLLM_CPU_INT4_W4A8=0"
    if dtype == "F16":
        return "W4A16 on this host (float16 model)"
    if host.int4_w4a8:
        return "W4A8 on this host (AMX; VLLM_CPU_INT4_W4A8=0 for W4A16)"
    return "W4A16 on this host (AMX; VLLM_CPU_INT4_W4A8=0 is set)"


def _on_cuda(scheme: Scheme) -> str:
    if scheme.weights.floating:
        return "Cutlass float8 (cc >= 8.9), else Marlin as W8A16"
    if scheme.activation_bits == 8:
        return "Cutlass int8 (cc >= 7.5) or Triton"
    return "Machete (cc 9.0) or Marlin (cc >= 7.5)"


def not_checkable_here(
    scheme: Scheme, host: Host, *, kv: bool, experts: bool = False
) -> str | None:
    """Why vLLM on this host cannot run the load check of the result, which another host may serve;
    None when it can.
    """
    if host.cuda_capability is not None:
        needed = MARLIN if not kv else FP8_UNITS
        return None if host.cuda_capability >= needed else "this host's GPU is too old for it"
    if scheme.weights.floating:
        return "vLLM's float8 product on a CPU would take hours; verify on a GPU"
    if scheme.activation_bits == 16 and scheme.weights.bits == 8:
        return "this host has no GPU, and vLLM's CPU build no 8-bit weight-only kernel"
    if experts and host.machine == "x86_64" and not host.amx:
        return "this host has no AMX, without which vLLM has no kernel for quantized experts"
    if _unpacks(host) and kv:
        return "this host has no AVX-512, without which vLLM has no 8-bit KV cache"
    return None


def _unpacks(host: Host) -> bool:
    """Whether 4-bit weights are served by Packhorse's kernel (avx2_int4 in serve), which unpacks
    them on load.
    """
    return host.machine == "x86_64" and not host.avx512


def serving_notes(
    targets: tuple[str, ...], scheme: Scheme, host: Host, *, kv: bool, experts: bool = False
) -> list[str]:
    """Notes on serving the result, here or on the targets."""
    notes = []
    if experts and "cpu" in targets:
        notes.append("on x86 CPUs vLLM runs quantized experts with AMX only (Xeon, 2023 and later)")
    weight_only = scheme.activation_bits == 16
    if "cpu" in targets and _unpacks(host):
        if weight_only and scheme.weights.bits == 4:
            notes.append(
                "this host has no AVX-512, and vLLM's build for it no 4-bit kernel: served here, "
                "the result is unpacked on load, and takes the memory and time of the original"
            )
        if kv:
            notes.append("this host has no AVX-512: vLLM has no 8-bit KV cache on it")
    if "cpu" in targets and scheme.weights.floating:
        notes.append(
            "on a CPU vLLM computes float8 with torch's reference product, hundreds of times "
            "slower than INT8: for CPUs use --method int8"
        )
    if "cuda" in targets:
        if scheme.weights.floating:
            notes.append("on GPUs below compute capability 8.9 it runs as W8A16 (Marlin)")
        here = host.cuda_capability
        if here is not None and here < MARLIN:
            have, need = (f"{major}.{minor}" for major, minor in (here, MARLIN))
            notes.append(
                f"this host's GPU has compute capability {have}; vLLM's kernel needs {need}"
            )
    return notes
