"""Engine settings as vLLM's arguments; combinations that vLLM would crash on are refused."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
from pathlib import Path
from typing import Any

import vllm.envs
from vllm import AsyncEngineArgs
from vllm.platforms import current_platform

from packhorse.serve.engines.vllm import patches
from packhorse.serve.engines.vllm.patches.cpu_features import has_amx, without_avx512
from packhorse.serve.engines.vllm.plugin import NAME as PLUGIN
from packhorse.serve.errors import StartupError
from packhorse.serve.settings.engine import EngineSettings

logger = logging.getLogger("packhorse.engine")

GIB = 1024**3
# By name: they are imported in the engine core's process.
WORKER = "packhorse.serve.engines.vllm.patches.cpu_worker.PatchedCPUWorker"
IN_WORKER = ("amx", "cpu_lora_math")  # patches that it installs
EXECUTOR = "packhorse.serve.engines.vllm.patches.in_process_executor.InProcessCPUExecutor"
SCHEDULER = "packhorse.serve.engines.vllm.patches.lora_time_slicing.scheduler"
# Settings that have vLLM's own names; the rest of EngineSettings is not for vLLM's engine.
SHARED = (
    "runner", "dtype", "max_model_len", "max_num_seqs", "kv_cache_dtype", "kv_cache_memory_bytes",
    "enforce_eager", "seed",
)  # fmt: skip
LORA = ("enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank")
# MODEL and its name are the command line's; without a tokenizer nothing here works.
TAKEN = {"model", "served_model_name", "skip_tokenizer_init"}
# vLLM would set the process's tracer provider.
TRACERS = {"otlp_traces_endpoint", "collect_detailed_traces"}


def engine_args(folder: Path, name: str, settings: EngineSettings) -> AsyncEngineArgs:
    """vLLM's arguments; unset ones keep vLLM's defaults, but for the CPU, see EngineSettings.

    Raises StartupError for a name or a value that vLLM does not have.
    """
    given: dict[str, Any] = {field: getattr(settings, field) for field in SHARED}
    if current_platform.is_cpu():
        if given["enforce_eager"] is None:
            given["enforce_eager"] = True
        given["kv_cache_memory_bytes"] = given["kv_cache_memory_bytes"] or GIB
        if any(patches.reason(name) is None for name in IN_WORKER):
            given["worker_cls"] = WORKER
        if _runs_in_process(settings.model_extra or {}):
            given["distributed_executor_backend"] = EXECUTOR
    given = {field: value for field, value in given.items() if value is not None}
    if settings.enable_lora:
        given |= {field: getattr(settings, field) for field in LORA}
        if max_active_loras(settings) > settings.max_loras:
            given["scheduler_cls"] = SCHEDULER
    if settings.reasoning_parser:
        given["reasoning_parser"] = settings.reasoning_parser
    if settings.hf_token:  # for a model's code in another repository; the model itself is here
        given["hf_token"] = settings.hf_token.get_secret_value()
    free = dict(settings.model_extra or {})
    _refuse_unknown(free)
    if free.get("mm_processor_cache_gb"):
        raise StartupError(
            "engine.mm_processor_cache_gb: vLLM's cache of processed images takes every rendered "
            "request for one that reaches the engine; here some are answered from the result cache "
            "or refused. Leave it out."
        )
    given["mm_processor_cache_gb"] = 0
    bound = settings.max_json_whitespace
    if patches.use("json_whitespace", needed=bound is not None):
        from packhorse.serve.engines.vllm.patches.json_whitespace import KEY

        free["additional_config"] = {**(free.get("additional_config") or {}), KEY: bound}
    if free.get("fully_sharded_loras") and current_platform.is_cpu():
        raise StartupError(
            "engine.fully_sharded_loras: on a CPU vLLM's layers for it give requests without an "
            "adapter somebody else's; leave it out."
        )
    try:
        return AsyncEngineArgs(
            model=str(folder), served_model_name=name, use_tqdm_on_load=False, **{**given, **free}
        )
    except (TypeError, ValueError) as error:
        raise StartupError(f"vLLM does not take these engine settings: {error}") from error


def max_active_loras(settings: EngineSettings) -> int:
    """How many adapters may have requests in the engine: those in a batch, and as many more as
    share its slots by time slicing. Raises StartupError for time slicing with a scheduler of the
    user's choice.
    """
    wanted = _wanted_active_loras(settings)
    if wanted > settings.max_loras and not patches.use("lora_time_slicing"):
        return settings.max_loras
    return wanted


def _wanted_active_loras(settings: EngineSettings) -> int:
    per_slot = settings.lora_oversubscription
    if "scheduler_cls" in (settings.model_extra or {}):
        if per_slot not in (None, 1):
            raise StartupError(
                f"engine.lora_oversubscription is {per_slot}, which needs Packhorse's own "
                "scheduler, and engine.scheduler_cls names another; remove one of the two."
            )
        per_slot = 1
    if per_slot is not None:
        return settings.max_loras * per_slot
    usual = settings.max_loras * (2 if current_platform.is_cpu() else 1)
    # Room for pinned ones is left.
    return min(usual, max(settings.max_loras, settings.max_cpu_loras // 2))


def _runs_in_process(settings: dict[str, Any]) -> bool:
    """Whether the CPU's one worker runs in the engine core's process."""
    is_possible = True
    if patches.reason("in_process_executor") is None:
        from packhorse.serve.engines.vllm.patches import in_process_executor

        is_possible = in_process_executor.is_possible(settings)
    return patches.use("in_process_executor", needed=is_possible)


def _refuse_unknown(names: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)} - TAKEN
    for name in names:
        if name in TRACERS:
            raise StartupError(
                f"engine.{name}: vLLM's own tracer is not used here; set tracing.endpoint, whose "
                "spans have the engine's too."
            )
        if name in TAKEN:
            raise StartupError(
                f"engine.{name} is not for the engine section; see docs/settings.md."
            )
        if name not in known:
            ours = set(EngineSettings.model_fields)
            close = difflib.get_close_matches(name, known | ours, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else "."
            raise StartupError(
                f"engine.{name}: neither Packhorse nor vLLM has such an engine setting{hint}"
            )


def refuse_unpatched(settings: EngineSettings) -> None:
    """Raises StartupError for settings that need a patch of vLLM which does not fit this version,
    and without which answers would be wrong or the engine would die.
    """
    on_cpu = current_platform.is_cpu()
    patches.require(
        "amx",
        needed=on_cpu and has_amx(),
        what="An engine on this CPU, which has AMX,",
        instead="Install the vLLM that this Packhorse was made for, or serve on another machine.",
    )
    patches.require(
        "cpu_lora_math",
        needed=on_cpu and settings.enable_lora,
        what="Serving adapters on a CPU",
        instead="Serve without adapters (neither adapters.folder nor adapters.store, "
        "engine.enable_lora false), or install the vLLM that this Packhorse was made for.",
    )


def refuse_what_would_crash(folder: Path, settings: EngineSettings) -> None:
    """Raises StartupError for what vLLM's CPU build finds out too late: float16 under W8A8 aborts
    the whole process; without AVX-512 4-bit weights have no kernel but ours, at their first use,
    and an 8-bit KV cache has none.
    """
    if not current_platform.is_cpu():
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config") or {}
    rounds_inputs = any(
        (group.get("input_activations") or {}).get("type") == "int"
        for group in _groups(quantization)
    )
    own = str(config.get("dtype") or config.get("torch_dtype") or "")
    dtype = own if settings.dtype == "auto" else settings.dtype
    if rounds_inputs and dtype in ("float16", "half"):
        raise StartupError(
            f"{folder} has 8-bit weights and activations, which vLLM's CPU kernel runs in bfloat16 "
            f"only, not in {dtype}; pass --dtype bfloat16."
        )
    packs = _packs(quantization)
    patches.require(
        "avx2_int4",
        needed=without_avx512() and packs,
        what="Serving 4-bit weights on a CPU without AVX-512",
        instead="Serve it on another machine, or quantize with --method int8.",
    )
    if not without_avx512():
        return
    if rounds_inputs:
        logger.warning(
            "This CPU has no AVX-512: its sums of 8-bit products may overflow, so answers of %s "
            "are less exact here than elsewhere; the original in bfloat16 is not concerned",
            folder.name,
        )
    if packs:
        _refuse_without_kernel(folder, config, quantization)
        logger.warning(
            "This CPU has no AVX-512, and vLLM no kernel for 4-bit weights on it: those of %s are "
            "unpacked on load, and take the memory and the time of the original",
            folder.name,
        )
    kv = "this CPU has no AVX-512, without which vLLM has no 8-bit KV cache"
    if settings.kv_cache_dtype.startswith("fp8"):
        raise StartupError(
            f"engine.kv_cache_dtype is {settings.kv_cache_dtype}, and {kv}; pass "
            "--kv-cache-dtype auto."
        )
    if quantization.get("kv_cache_scheme"):
        raise StartupError(
            f"{folder} has scales for an 8-bit KV cache, which vLLM takes for them by itself, and "
            f"{kv}; serve it on another machine, or quantize without --kv."
        )


def _groups(quantization: dict[str, Any]) -> list[dict[str, Any]]:
    return list((quantization.get("config_groups") or {}).values())


def _packs(quantization: dict[str, Any]) -> bool:
    """Whether weights are packed, several to a number."""
    return quantization.get("quant_method") in ("gptq", "awq") or any(
        (group.get("weights") or {}).get("num_bits") == 4 for group in _groups(quantization)
    )


def _refuse_without_kernel(
    folder: Path, config: dict[str, Any], quantization: dict[str, Any]
) -> None:
    """Raises StartupError for packed weights that the patch avx2_int4 has no kernel for either."""
    has = None
    bits = quantization.get("bits") or quantization.get("w_bit") or 4
    if bits != 4:
        has = f"packed {bits}-bit weights"
    elif any(
        (group.get("weights") or {}).get("num_bits") == 4 and group.get("input_activations")
        for group in _groups(quantization)
    ):
        has = "4-bit weights with rounded activations"
    elif config.get("num_local_experts") or config.get("num_experts"):
        has = "experts of 4 bits"
    if has is not None:
        raise StartupError(
            f"{folder} has {has}, and this CPU has no AVX-512, without which there is no kernel "
            "for them; serve it on another machine, or quantize with --method int8."
        )
    if vllm.envs.VLLM_PLUGINS is not None and PLUGIN not in vllm.envs.VLLM_PLUGINS:
        raise StartupError(
            f"{folder} has 4-bit weights, for which vLLM has no kernel on a CPU without AVX-512; "
            f"Packhorse's is a plugin, and VLLM_PLUGINS is {','.join(vllm.envs.VLLM_PLUGINS)!r}: "
            f"add {PLUGIN} to it, or unset it."
        )


def warn_of_missing_scales(folder: Path, settings: EngineSettings) -> None:
    """An 8-bit KV cache without the checkpoint's own scales loses accuracy for nothing."""
    if not settings.kv_cache_dtype.startswith("fp8"):
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config") or {}
    if not quantization.get("kv_cache_scheme"):
        logger.warning(
            "The KV cache is %s, but %s has no k/v scales, so they are 1.0 and long contexts lose "
            "accuracy; quantize with calibrated scales, or use --kv-cache-dtype auto",
            settings.kv_cache_dtype, folder.name,
        )  # fmt: skip
