"""The load check without an engine: the comparison, the words of a failure. With one: tests/e2e."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packhorse.quantize.errors import Unloadable
from packhorse.quantize.quality import dequantized, engine_check
from packhorse.quantize.quality.engine_check import _describe, _kernel, _last_words
from packhorse.quantize.quality.evaluate import compare
from packhorse.quantize.report.report import load_check_notes
from packhorse.quantize.run import run
from packhorse.quantize.settings import Settings


def test_equal_outputs_differ_in_nothing() -> None:
    outputs = [{"answer": [1, 2], "logprobs": [-0.5]}, {"answer": [], "logprobs": []}]
    assert compare(outputs, outputs) == {
        "prompts": 2,
        "answers_equal": 1.0,
        "answers_until_difference": 1.0,
        "first_differences": [],
        "prompt_tokens": 1,
        "logprob_difference_mean": 0.0,
        "logprob_difference_max": 0.0,
    }


def test_differences_are_counted_from_the_first_token_that_differs() -> None:
    before = [
        {"answer": [1, 2, 3, 4], "logprobs": [-1.0, -2.0]},
        {"answer": [5, 6], "logprobs": [-3.0]},
        {"answer": [7], "logprobs": [-1.0]},
    ]
    after = [
        {"answer": [1, 9, 3, 4], "logprobs": [-1.5, -2.0]},
        {"answer": [5, 6, 8], "logprobs": [-2.0]},  # goes on where the original ended
        {"answer": [7], "logprobs": [-1.0]},
    ]
    found = compare(before, after)
    assert found["answers_equal"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["first_differences"] == [1, 2]
    assert found["answers_until_difference"] == pytest.approx((1 / 4 + 2 / 3 + 1) / 3, abs=1e-4)
    assert found["logprob_difference_mean"] == pytest.approx(1.5 / 4)
    assert found["logprob_difference_max"] == 1.0


PROMPTS = [[5, 6, 7, 8] * 8, [9, 10, 11] * 8]


def engine(monkeypatch: pytest.MonkeyPatch, made: Path, off: float) -> None:
    """Stands in for both engines: the finished checkpoint's log-probabilities are `off` from what
    its codes give, and the original does not run.
    """
    outputs = [
        {"prompt": ids, "answer": [1], "logprobs": [value + off for value in values]}
        for ids, values in zip(PROMPTS, dequantized.logprobs(made, PROMPTS), strict=True)
    ]

    def run_child(folder: Path, prompts: object, timeout_s: float) -> dict[str, Any]:
        if folder != made:
            raise engine_check._EngineFailure("It is broken.")
        return {
            "vllm": "0", "dtype": "bfloat16", "load_seconds": 1.0, "kv_cache_dtype": "auto",
            "kv_scales": {}, "layers": {"W8A8 int8 by X": 12}, "outputs": outputs,
        }  # fmt: skip

    monkeypatch.setattr(engine_check, "_run_child", run_child)


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "int8"
    settings = Settings(str(tiny_checkpoint), out, "int8", quality=False, verify=False)
    run(settings, lambda *_: lambda _: None)
    return out


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_rounding_of_a_kernel_passes_and_a_failing_original_is_noted(
    made: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    engine(monkeypatch, made, off)
    found = engine_check.verify(tiny_checkpoint, made, PROMPTS)
    assert found["reference"]["prompt_tokens"] == 31 + 23
    assert found["reference"]["logprob_difference_mean"] == pytest.approx(off, abs=1e-4)
    assert found["original"] == "not compared: vLLM does not run the original. It is broken."
    assert "compared" not in found


@pytest.mark.parametrize("off", [1.0, -1.0])
def test_an_engine_that_computes_something_else_is_an_error(
    made: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    engine(monkeypatch, made, off)
    with pytest.raises(Unloadable, match=r"1\.00 nats apart.*not published.*--no-verify"):
        engine_check.verify(tiny_checkpoint, made, PROMPTS)


def test_a_failed_load_check_publishes_nothing_and_loses_nothing(
    made: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise Unloadable("nats apart")

    monkeypatch.setattr("packhorse.quantize.run.verify", fail)
    settings = Settings(str(tiny_checkpoint), tmp_path / "out", "int8", quality=False)
    with pytest.raises(Unloadable, match="nats apart"):
        run(settings, lambda *_: lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    run(replace(settings, verify=False, resume=True), lambda *_: lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_codes_that_do_not_fit_in_memory_are_not_compared_and_the_report_says_so(
    made: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(monkeypatch, made, 1.0)
    monkeypatch.setattr(engine_check, "free_memory_bytes", lambda: 1000)
    found = engine_check.verify(tiny_checkpoint, made, PROMPTS)
    assert found["reference"].startswith("not compared: dequantized it takes ")
    assert "1,000 are free" in load_check_notes(found)[0]
    assert load_check_notes({"reference": {}, "compared": {"logprob_difference_mean": 0.1}}) == []
    far = {"reference": {}, "compared": {"logprob_difference_mean": 0.6}}
    assert "moved by 0.60 on average from the original's" in load_check_notes(far)[0]


LOG = """
(EngineCore pid=7) ERROR 11-22 11:00:00 [core.py:9] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-22 11:00:00 [core.py:9]   File "loader.py", line 3, in load
(EngineCore pid=7) ERROR 11-22 11:00:00 [core.py:9] ValueError: q_proj.weight: shape mismatch
(EngineCore pid=7) ValueError: q_proj.weight: shape mismatch
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_cause_is_found_in_an_engines_log() -> None:
    words = _last_words(LOG, 1)
    assert words == "The engine's last words: ValueError: q_proj.weight: shape mismatch."
    assert "ended with SIGILL" in _last_words("", -4)
    assert _last_words("one\ntwo\nthree\nfour").endswith("two | three | four.")


class UnquantizedLinearMethod:
    pass


class CompressedTensorsW8A8Int8:
    kernel = SimpleNamespace()


class MarlinLinearKernel:
    config = SimpleNamespace(weight_type=SimpleNamespace(size_bits=8))


class CompressedTensorsWNA16:
    def __init__(self) -> None:
        self.kernel = MarlinLinearKernel()


def test_layers_are_named_after_what_they_compute() -> None:
    plain = SimpleNamespace(quant_method=UnquantizedLinearMethod())
    assert _describe(plain) == "unquantized by UnquantizedLinearMethod"
    method = SimpleNamespace()
    int8 = SimpleNamespace(quant_method=method, scheme=CompressedTensorsW8A8Int8())
    assert _describe(int8).startswith("W8A8 int8 by ")
    packed = SimpleNamespace(quant_method=method, scheme=CompressedTensorsWNA16())
    assert _describe(packed) == "W8A16 by MarlinLinearKernel"
    packed.use_w4a8 = True
    assert _describe(packed) == "W4A8 by MarlinLinearKernel"
    gptq = SimpleNamespace(quant_method=CompressedTensorsWNA16(), use_w4a8=False)
    assert _describe(gptq) == "W4A16 by MarlinLinearKernel"


def test_the_kernel_is_deduced_only_where_the_engine_does_not_say(tmp_path: Path) -> None:
    layers = {"unquantized by UnquantizedLinearMethod": 1, "W4A8 by CPUWNA16LinearKernel": 8}
    assert _kernel(layers, tmp_path) == "W4A8 by CPUWNA16LinearKernel"
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    assert _kernel({}, tmp_path) == "W4A16 (deduced from config.json)"
    (tmp_path / "config.json").write_text("{}")
    assert _kernel({"unquantized by X": 3}, tmp_path) == "unquantized"
