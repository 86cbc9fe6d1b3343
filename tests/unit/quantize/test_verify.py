"""The load proof without an engine: the comparison, the words of a failure. With one: tests/e2e."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantize.verify import _describe, _kernel, _last_words, compare


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
