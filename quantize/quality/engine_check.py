"""The load check: vLLM loads the finished checkpoint and generates with it, and its
log-probabilities are compared with those of the codes on disk. Then it loads the original, and the
two are compared, as a measure of quality.

The models run one after the other, each in a child process, which is this file as a program; the
engine ends with its process. Called by run.py before a result is published. No other file of
`quantize` imports vllm, and this one does so in the child only.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from packhorse.quantize import formats
from packhorse.quantize.errors import QuantizeError, Unloadable
from packhorse.quantize.model.memory import free_memory_bytes
from packhorse.quantize.settings import Progress

MAX_PROMPTS = 16
ANSWER_TOKENS = 32
TOP = 20
"""Likeliest tokens per position that are compared: vLLM's default limit."""
MAX_MODEL_LEN = 2048
PROMPT_TOKENS = 512
"""Longer prompts are cut off."""
REFERENCE_TOKENS = 512
"""Prompt tokens that are compared with the codes, as the reference runs without an engine's
speed."""
IMPLAUSIBLE_NATS = 0.2
"""A mean difference from the codes above this means that the engine computes something else.
Rounding in kernels causes 0.00 to 0.07 (W4A8, random tokens); every code off by one causes 0.3;
codes in the wrong order, or scales of the wrong group or sign, 8 (docs/lab-log.md)."""
KV_CACHE_BYTES = 1024**3
GRACE_S = 10.0
"""Between the signal to stop and the kill."""
MODULE = "packhorse.quantize.quality.engine_check"  # in the child, __name__ is __main__
RANDOM_PROMPTS = (4, 64)
"""Number and length of the random prompts that replace missing ones."""

Prompt = str | Sequence[int]
"""Token ids, or text for the model with its special tokens, such as a rendered chat template."""


def _silent(label: str, steps: int) -> Callable[[int], None]:
    return lambda done: None


def verify(
    original: Path,
    made: Path,
    prompts: Sequence[Prompt] = (),
    progress: Progress = _silent,
    *,
    timeout_s: float = 1800,
) -> dict[str, Any]:
    """Load `made` and then `original` in vLLM, and compare their outputs for the first 16 prompts:
    greedy answers of up to 32 tokens, and the log-probabilities of the prompts' own tokens. Prompts
    are all text or all token ids; without prompts, random tokens are used. `timeout_s` is per
    model.

    Raises Unloadable when `made` does not run (with the engine's last errors), computes NaN, or
    differs from its codes by more than IMPLAUSIBLE_NATS. When the original does not run, the result
    says so under "original"; when the codes cannot be run without an engine, under "reference".
    Leaves no process behind, also after Ctrl-C.
    """
    from packhorse.quantize.quality import divergence, evaluate  # late: imports transformers

    advance = progress("loading in vLLM", 2)
    chosen = [p if isinstance(p, str) else list(p) for p in prompts[:MAX_PROMPTS]]
    try:
        after = _run_child(made, chosen, timeout_s)
    except _EngineFailure as failure:
        raise Unloadable(
            f"vLLM does not run the finished checkpoint, so it is not published. {failure} This is "
            "an error of Packhorse or a model it does not know well; --resume --no-verify "
            "publishes it unchecked."
        ) from failure
    advance(1)
    if any(math.isnan(value) for output in after["outputs"] for value in output["logprobs"]):
        raise Unloadable(
            f"vLLM loads the finished checkpoint but computes NaN with it, in {after['dtype']}; so "
            "it is not published; --resume --no-verify publishes it anyway."
        )
    result: dict[str, Any] = {
        "engine": f"vllm {after['vllm']}",
        "dtype": after["dtype"],
        "load_seconds": after["load_seconds"],
        "kernel": _kernel(after["layers"], made),
        "layers": after["layers"],
        "kv_cache_dtype": after["kv_cache_dtype"],
        # Without an 8-bit cache, all scales are 1 and not used.
        "kv_scales": after["kv_scales"] if after["kv_cache_dtype"].startswith("fp8") else {},
    }
    result["reference"] = _compare_with_codes(made, original, after["outputs"])
    try:
        before = _run_child(original, chosen, timeout_s)
    except _EngineFailure as failure:
        result["original"] = f"not compared: vLLM does not run the original. {failure}"
    else:
        result["compared"] = evaluate.compare(before["outputs"], after["outputs"])
        likeliest = [
            [dict(pairs) for output in one["outputs"] for pairs in output["likeliest"]]
            for one in (before, after)
        ]
        result["distance"] = divergence.bucketed(*likeliest)
    advance(1)
    return result


def _compare_with_codes(
    made: Path, original: Path, outputs: Sequence[dict[str, Any]]
) -> dict[str, Any] | str:
    """Compare the engine's log-probabilities with those of the codes on disk, dequantized and run
    by transformers. Returns the figures, or the reason why they cannot be had. Raises Unloadable
    above IMPLAUSIBLE_NATS.
    """
    from packhorse.quantize.quality import dequantized, evaluate

    needed = sum(path.stat().st_size for path in original.glob("*.safetensors"))
    if (free := free_memory_bytes()) is not None and free < needed:
        return (
            f"not compared: dequantized it takes {needed:,} bytes of memory; {free:,} are free "
            "here (a container's limit counts)"
        )
    seen = 0
    chosen = []
    for output in outputs:
        if seen < REFERENCE_TOKENS:
            seen += len(output["prompt"])
            chosen.append(output)
    try:
        wanted = dequantized.logprobs(made, [output["prompt"] for output in chosen])
    except (QuantizeError, ImportError, OSError, RuntimeError, ValueError) as error:
        return f"not compared: transformers does not run the codes. {error}"
    differences: list[float] = []
    for output, codes in zip(chosen, wanted, strict=True):
        differences += evaluate.apart(output["logprobs"], codes)
    moved = evaluate.moved(differences)
    mean = moved["logprob_difference_mean"]
    if not mean <= IMPLAUSIBLE_NATS:  # NaN too
        raise Unloadable(
            f"vLLM loads the finished checkpoint but does not compute what its codes say: "
            f"log-probabilities are {mean:.2f} nats apart on average; more than "
            f"{IMPLAUSIBLE_NATS} is no rounding. It is not published. "
            "This is an error of Packhorse or of this machine's vLLM (for W4A8 on a CPU, try "
            "VLLM_CPU_INT4_W4A8=0); --resume --no-verify publishes it unchecked."
        )
    return moved


def _kernel(layers: dict[str, int], made: Path) -> str:
    """The effective scheme and kernel of most quantized layers, as the engine reports them; else
    the scheme in config.json.
    """
    named: Counter[str] = Counter()
    for description, count in layers.items():
        scheme, _, kernel = description.partition(" by ")
        if kernel and not scheme.startswith("unquantized"):
            named[description] += count
    if named:
        return named.most_common(1)[0][0]
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    if quantization := config.get("quantization_config"):
        return f"{formats.of(quantization).scheme} (deduced from config.json)"
    return "unquantized"


class _EngineFailure(Exception):
    """A child ended without a result. The message says why."""


def _run_child(folder: Path, prompts: list[str | list[int]], timeout_s: float) -> dict[str, Any]:
    """The result of `_generate` in a child process. Its process group is gone afterwards."""
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the child is the engine itself
        "HF_HUB_OFFLINE": "1",  # both models are folders
    }
    if "VLLM_PLUGINS" in environment:  # Packhorse's plugin runs 4 bits without AVX-512
        environment["VLLM_PLUGINS"] += ",packhorse"
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # overrides kv_cache_memory_bytes
    with tempfile.TemporaryDirectory(prefix="packhorse-verify-") as directory:
        job, result, log = (Path(directory) / name for name in ("job", "result", "log"))
        job.write_text(json.dumps({"folder": str(folder.resolve()), "prompts": prompts}))
        program = [sys.executable, "-P", "-m", "packhorse.quantize.quality.engine_check"]
        command = [*program, str(job), str(result)]
        timed_out = False
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closes when this process ends, in any way
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end_group(process)
        words = log.read_text(encoding="utf-8", errors="replace")
        # The result appears in one rename; how the engine ends after that does not matter.
        if not result.is_file():
            if timed_out:
                raise _EngineFailure(f"It took longer than {timeout_s:.0f} s. {_last_words(words)}")
            raise _EngineFailure(_last_words(words, process.returncode))
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the child's process group, which has its engine's processes: with SIGTERM first, because
    killed ones leave shared memory behind, and then with SIGKILL.
    """
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


_LOGGED = re.compile(r"^(\(.*?\)\s*|\[rank\d+\]:\s*)?(ERROR [\d-]+ [\d:]+ \[.*?\]\s*)?")
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b.*: ")
_GENERAL = re.compile("Engine core initialization failed|See root cause above|EngineDeadError")


def _last_words(log: str, returncode: int = 0) -> str:
    """The first errors in an engine's log, which name the cause; without errors, its last lines."""
    lines = [_LOGGED.sub("", line).strip() for line in log.splitlines()]
    errors = [
        line for line in dict.fromkeys(lines) if _ERROR.match(line) and not _GENERAL.search(line)
    ]
    words = errors[:2] or [line for line in lines if line][-3:]
    ended = f"The process ended with {signal.Signals(-returncode).name}. " if returncode < 0 else ""
    return f"{ended}The engine's last words: {' | '.join(words)[:1500] or 'none'}."


# ---------------------------------------------------------------- the child


class Probe:
    """Extends vLLM's worker by a method that describes what the engine runs."""

    def packhorse_describe(self) -> dict[str, Any]:
        """Counts of linear layers by scheme and kernel, and the KV cache's dtype and scales."""
        layers: Counter[str] = Counter()
        scales: dict[str, dict[str, float]] = {}
        dtypes: Counter[str] = Counter()  # the engine's config may still say "auto"
        for name, module in self.get_model().named_modules():  # type: ignore[attr-defined]
            if hasattr(module, "_k_scale_float"):
                dtypes[str(getattr(module, "kv_cache_dtype", "auto"))] += 1
                scales[name.removesuffix(".attn")] = {
                    "k": float(module._k_scale_float),
                    "v": float(module._v_scale_float),
                }
            elif hasattr(module, "quant_method") and hasattr(module, "output_size"):
                layers[_describe(module)] += 1
        cache = dtypes.most_common(1)[0][0] if dtypes else "auto"
        return {"layers": dict(layers), "kv_scales": scales, "kv_cache_dtype": cache}


def _describe(layer: Any) -> str:
    """The scheme and the kernel class of a linear layer of vLLM: `W4A8 by CPUWNA16LinearKernel`."""
    method = getattr(layer, "quant_method", None)
    scheme = getattr(layer, "scheme", None)
    owner = scheme if scheme is not None else method
    kernel = getattr(owner, "kernel", None) or getattr(owner, "fp8_linear", None)
    name = type(kernel if kernel is not None else owner).__name__
    if "Unquantized" in type(method).__name__:
        return f"unquantized by {name}"
    if hasattr(layer, "use_w4a8"):
        return f"{'W4A8' if layer.use_w4a8 else 'W4A16'} by {name}"
    kind = type(owner).__name__
    if "Int8" in kind:
        return f"W8A8 int8 by {name}"
    if "Fp8" in kind:
        weight_only = "A16" in kind or "Marlin" in name
        return f"{'W8A16' if weight_only else 'W8A8'} fp8 by {name}"
    bits = getattr(getattr(getattr(kernel, "config", None), "weight_type", None), "size_bits", None)
    return f"W{bits}A16 by {name}" if bits else f"{kind} by {name}"


def _generate(folder: Path, prompts: list[str | list[int]]) -> dict[str, Any]:
    """Load the folder in vLLM and generate."""
    gc.disable()  # it would scan all imported modules repeatedly, and free nothing
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    # Linux kills a process with SIGILL that uses AMX tiles without permission. oneDNN asks for it
    # at its first large product, vLLM's attention never does, so a short first prompt would be
    # fatal.
    torch.cpu._init_amx()  # does nothing where there is no AMX
    gc.freeze()  # vLLM runs the collector nine times per load, over all imported modules
    gc.enable()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = {**config, **(config.get("text_config") or {})}
    longest = min(int(text.get("max_position_embeddings") or MAX_MODEL_LEN), MAX_MODEL_LEN)
    if not prompts:
        vocabulary = int(text["vocab_size"])
        choose, (count, length) = random.Random(0), RANDOM_PROMPTS
        prompts = [[choose.randrange(vocabulary) for _ in range(length)] for _ in range(count)]
    needs_tokenizer = isinstance(prompts[0], str)
    started_s = time.monotonic()
    llm = LLM(
        model=str(folder),
        max_model_len=longest,
        max_num_seqs=MAX_PROMPTS,
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        enable_prefix_caching=False,
        seed=0,
        use_tqdm_on_load=False,
        skip_tokenizer_init=not needs_tokenizer,
        worker_extension_cls=f"{MODULE}.Probe",
        distributed_executor_backend="uni",
    )
    load_seconds = time.monotonic() - started_s
    room = min(PROMPT_TOKENS, longest - ANSWER_TOKENS)
    tokenizer = llm.get_tokenizer() if needs_tokenizer else None
    tokens = [
        (tokenizer.encode(p, add_special_tokens=False) if tokenizer else p)[:room] for p in prompts
    ]
    sampling = SamplingParams(
        temperature=0.0, max_tokens=ANSWER_TOKENS, prompt_logprobs=TOP, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in tokens], sampling, use_tqdm=False)
    (described,) = llm.collective_rpc("packhorse_describe")
    engine = llm.llm_engine.vllm_config
    return {
        **described,
        "vllm": vllm.__version__,
        "dtype": str(engine.model_config.dtype).removeprefix("torch."),
        "load_seconds": round(load_seconds, 1),
        "outputs": [
            {
                "prompt": ids,
                "answer": list(output.outputs[0].token_ids),
                "logprobs": [
                    entry[token].logprob
                    for token, entry in zip(ids, output.prompt_logprobs, strict=True)
                    if entry is not None
                ],
                # Pairs of token id and log-probability, as JSON turns integer keys into text.
                "likeliest": [
                    [[other, found.logprob] for other, found in entry.items() if found.rank <= TOP]
                    for entry in output.prompt_logprobs
                    if entry is not None
                ],
            }
            for ids, output in zip(tokens, outputs, strict=True)
        ],
    }


def _exit_with_parent() -> None:
    """Kill this process group when the parent ends: standard input is a pipe from the parent, which
    never writes to it.
    """
    while os.read(0, 4096):  # not sys.stdin, whose lock would abort Python at its exit
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(job: Path, result: Path) -> None:
    """The child: generate for the job, and write the result in one rename."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    job_document = json.loads(job.read_text(encoding="utf-8"))
    found = _generate(Path(job_document["folder"]), job_document["prompts"])
    written = result.with_suffix(".partial")
    written.write_text(json.dumps(found), encoding="utf-8")
    written.rename(result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
