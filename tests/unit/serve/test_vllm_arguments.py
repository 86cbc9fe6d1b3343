"""Engine settings and constraints: what is passed on, what is refused with which words."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from packhorse.serve.engines.vllm.arguments import (
    SCHEDULER,
    engine_args,
    max_active_loras,
    refuse_what_would_crash,
    warn_of_missing_scales,
)
from packhorse.serve.engines.vllm.constraints import check_schema, check_tools, structured_outputs
from packhorse.serve.errors import Invalid, StartupError
from packhorse.serve.messages import Constraint
from packhorse.serve.settings.engine import EngineSettings


def settings(**fields: Any) -> EngineSettings:
    return EngineSettings.model_validate(fields)


def test_any_vllm_field_goes_through(tiny_checkpoint: Path) -> None:
    args = engine_args(
        tiny_checkpoint, "m", settings(max_num_batched_tokens=64, max_num_seqs=3, block_size=32)
    )
    assert (args.max_num_batched_tokens, args.max_num_seqs, args.block_size) == (64, 3, 32)
    assert args.served_model_name == "m"


def test_a_model_that_was_found_has_no_revision_left(tiny_checkpoint: Path) -> None:
    """Its code may be another repository's, which is read with a token, at a revision."""
    asked = settings(revision="v2", code_revision="v1", hf_token="hf_token", download_dir="/x")
    args = engine_args(tiny_checkpoint, "m", asked)
    assert (args.model, args.revision) == (str(tiny_checkpoint), None)
    assert (args.code_revision, args.hf_token) == ("v1", "hf_token")


@pytest.mark.parametrize(
    ("fields", "active"),
    [
        ({}, 8),
        ({"lora_oversubscription": 1}, 4),
        ({"max_cpu_loras": 13}, 6),
        ({"max_cpu_loras": 5}, 4),
        ({"lora_oversubscription": 3}, 12),
        ({"scheduler_cls": "somebody.Elses"}, 4),
    ],
)
def test_active_adapters_beyond_the_slots_need_our_scheduler(
    fields: dict[str, Any], active: int, tiny_checkpoint: Path
) -> None:
    asked = settings(enable_lora=True, **fields)
    assert max_active_loras(asked) == active
    ours = SCHEDULER if active > 4 else fields.get("scheduler_cls")
    assert engine_args(tiny_checkpoint, "m", asked).scheduler_cls == ours


def test_time_slicing_with_somebody_elses_scheduler_is_refused() -> None:
    with pytest.raises(
        StartupError, match=r"lora_oversubscription is 2, .*engine\.scheduler_cls names"
    ):
        max_active_loras(settings(lora_oversubscription=2, scheduler_cls="somebody.Elses"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_cache_dtyp": "fp8"}, "engine.kv_cache_dtyp: .* did you mean kv_cache_dtype"),
        ({"max_num_batched_token": 1}, "did you mean max_num_batched_tokens"),
        ({"xyzzy": 1}, "neither Packhorse nor vLLM has such an engine setting"),
        ({"model": "x"}, "engine.model is not for the engine section"),
        ({"otlp_traces_endpoint": "http://x"}, "set tracing.endpoint"),
    ],
)
def test_an_unknown_engine_setting_names_near_misses(
    tiny_checkpoint: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartupError, match=message):
        engine_args(tiny_checkpoint, "m", settings(**fields))


@pytest.mark.parametrize(
    ("dtype", "scheme", "warns"),
    [("fp8", None, True), ("fp8", {"num_bits": 8}, False), ("auto", None, False)],
)
def test_an_8_bit_cache_without_scales_is_worth_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, scheme: Any, warns: bool
) -> None:
    config = {"quantization_config": {"kv_cache_scheme": scheme}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "packhorse.engine"):
        warn_of_missing_scales(tmp_path, settings(kv_cache_dtype=dtype))
    assert ("has no k/v scales" in caplog.text) == warns


INT8 = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {"weights": {"num_bits": 8}, "input_activations": {"type": "int"}}
    },
}
PACKED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 4}, "input_activations": None}},
}

W4A8 = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4}, "input_activations": {"type": "int"}}
    },
}


def checkpoint(folder: Path, quantization: dict[str, Any] | None, dtype: str = "bfloat16") -> Path:
    config = {"dtype": dtype, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("quantization", "fields", "message"),
    [
        ({"quant_method": "gptq", "bits": 8}, {}, r"packed 8-bit weights, .*--method int8\."),
        (W4A8, {}, r"4-bit weights with rounded activations, .*no AVX-512"),
        (None, {"kv_cache_dtype": "fp8"}, r"is fp8, and .*no AVX-512.*--kv-cache-dtype auto\."),
        (INT8 | {"kv_cache_scheme": {"num_bits": 8}}, {}, r"has scales.*quantize without --kv\."),
    ],
)
def test_what_a_cpu_without_avx512_cannot_run_is_refused_there_alone(
    quantization: dict[str, Any] | None,
    fields: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint(tmp_path, quantization)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    with pytest.raises(StartupError, match=message):
        refuse_what_would_crash(folder, settings(**fields))
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    refuse_what_would_crash(folder, settings(**fields))


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize(
    "quantization", [{"quant_method": "gptq"}, {"quant_method": "awq"}, PACKED]
)
def test_4_bit_weights_are_unpacked_without_avx512_and_the_start_says_so(
    avx512: bool,
    quantization: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    refuse_what_would_crash(checkpoint(tmp_path, quantization), settings())
    assert ("unpacked on load" in caplog.text) is not avx512
    monkeypatch.setenv("VLLM_PLUGINS", "somebody_elses")
    with nullcontext() if avx512 else pytest.raises(StartupError, match=r"add packhorse to it"):
        refuse_what_would_crash(checkpoint(tmp_path, quantization), settings())


@pytest.mark.parametrize("avx512", [True, False])
def test_int8_is_less_exact_without_avx512_and_the_start_says_so(
    avx512: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    refuse_what_would_crash(checkpoint(tmp_path, INT8), settings())
    assert ("may overflow" in caplog.text) is not avx512


def test_float16_under_int8_is_refused_on_every_cpu(tmp_path: Path) -> None:
    refuse_what_would_crash(checkpoint(tmp_path, INT8), settings())
    with pytest.raises(StartupError, match=r"bfloat16 only, not in float16; pass --dtype"):
        refuse_what_would_crash(checkpoint(tmp_path, INT8, "float16"), settings())


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint("regex", "(a{1,999}){999}"), "repeat counts multiply to more than 10000"),
        (Constraint("regex", "a{,99999}"), "repeat counts"),
        (Constraint("regex", "a" * 70_000), "70000 characters, above the limit of 65536"),
        (Constraint("choice", tuple("ab" * 501)), "1002 choices, above the limit of 1000"),
        (Constraint("grammar", "x" * 70_000), "70000 characters"),
        (Constraint("json", {"maxLength": 20_000}), "maxLength=20000 .* above the limit of 10000"),
        (Constraint("regex", "a{" + "9" * 5000 + "}"), "repeat counts"),
        (Constraint("grammar", 'root ::= ("a"{1000}){1000}'), "repeat counts"),
        (Constraint("json", {"items": [{"pattern": "(a{200}){200}"}]}), "come to 40000, above"),
        (
            Constraint("json", {"anyOf": [{"pattern": "a{400}"} for _ in range(3)]}),
            "come to 1200, above the limit of 1000",
        ),
        (Constraint("json", {"enum": [2**70]}), "does not fit into 64 bits"),
    ],
)
def test_a_constraint_out_of_bounds_is_refused(constraint: Constraint, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        structured_outputs(constraint)


def test_tools_are_bounded_together() -> None:
    tool = {"function": {"parameters": {"properties": {"p": {"description": "y" * 40_000}}}}}
    check_tools([tool])
    with pytest.raises(Invalid, match=r"parameters have \d+ characters, above the limit of 65536"):
        check_tools([tool, tool])


def test_a_schema_may_be_32_levels_deep_and_no_deeper() -> None:
    schema: dict[str, Any] = {}
    for _ in range(31):
        schema = {"items": schema}
    check_schema(schema)
    with pytest.raises(Invalid, match="deeper than 32 levels"):
        check_schema({"items": schema})


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("json", {"type": "object", "properties": {"maxLength": {"type": "integer"}}}),
        Constraint("json_object", True),
        Constraint("regex", r"\d{3}-\d{4}"),
        Constraint("choice", ("a", "b")),
        Constraint("grammar", 'root ::= "a"'),
    ],
)
def test_a_constraint_within_bounds_reaches_vllm_as_it_is(constraint: Constraint) -> None:
    made = structured_outputs(constraint)
    sent = getattr(made, constraint.kind)
    expected = list(constraint.value) if constraint.kind == "choice" else constraint.value
    assert sent == expected
