"""Running a model block by block gives what the whole model gives, for every family."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from packhorse.quantize.calibration import runner as runner_module
from packhorse.quantize.calibration.activation_store import ActivationStore
from packhorse.quantize.calibration.block_loader import load_blocks
from packhorse.quantize.calibration.runner import Kind, Runner, RunningBlock
from packhorse.quantize.methods import gptq
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.families import FAMILIES, Group
from packhorse.quantize.numerics.grid import QuantizationArgs, Scheme
from tests.unit.quantize.test_pipeline import EXPERTS


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models in these tests compute in float32, so the blocks do too."""
    monkeypatch.setattr(runner_module, "fast_matmul", contextlib.nullcontext)


FAST_PRODUCTS = runner_module.fast_matmul
COMMON = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
SPECIAL = {
    "mistral": {"sliding_window": 16},
    **EXPERTS,
    "gemma2": {
        "sliding_window": 16,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 0.5,
    },
    "gemma3_text": {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 32},
}


def made(model_type: str, folder: Path) -> Path:
    """A tiny random model, with norms and biases that are not all alike."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **SPECIAL.get(model_type, {})})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            offset = 0.0 if "bias" in name or model_type.startswith("gemma") else 1.0
            torch.nn.init.normal_(parameter, offset, 0.2)
    model.save_pretrained(folder)
    return folder


def hidden(runner: Runner, kind: Kind) -> torch.Tensor:
    return torch.cat([runner.hidden(kind, number) for number in range(runner.batches)])


def groups_of(live: RunningBlock) -> list[Group]:
    family = live.runner.family
    every = [group for stage in family.stages(live.names) for group in stage]
    return [group for group in every if not family.is_expert(group[0])]


def last_hidden(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    """What the whole model gives its final norm."""
    capped = "gemma2" in (folder / "config.json").read_text()  # sdpa would leave the cap out
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager" if capped else "sdpa"
    ).eval()
    seen: list[torch.Tensor] = []
    model.get_decoder().norm.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(rows)
    return seen[0]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@torch.inference_mode()
def test_runner_one_by_one_equal_the_whole_model(model_type: str, tmp_path: Path) -> None:
    source = Checkpoint(made(model_type, tmp_path))
    family = FAMILIES[model_type]
    rows = torch.randint(3, 128, (10, 48), generator=torch.Generator().manual_seed(1))
    wanted = last_hidden(tmp_path, rows)
    runner = Runner(source, family, rows, torch.device("cpu"))
    for block in load_blocks(source, family):
        live = runner.enter(block)
        runner.leave(live.record_original(groups_of(live)))
    torch.testing.assert_close(hidden(runner, "quantized"), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden(runner, "original"), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@torch.inference_mode()
def test_parts_and_residuals_are_the_modules(model_type: str, tmp_path: Path) -> None:
    """A part puts out what its layer does; a residual is what a layer's output is added to."""
    source = Checkpoint(made(model_type, tmp_path))
    family = FAMILIES[model_type]
    runner = Runner(source, family, torch.zeros(1, 4, dtype=torch.long), torch.device("cpu"))
    block = runner.enter(next(load_blocks(source, family))).module
    assert [part for part, _ in family.parts] == ["self_attn", "mlp"]
    for part, layer in family.parts:
        assert layer.startswith(f"{part}.")
        block.get_submodule(part)
    assert bool(family.residuals) == (model_type not in ("gemma2", "gemma3_text"))
    for layer, norm in family.residuals:
        assert layer in {last for _, last in family.parts}
        assert "Norm" in type(block.get_submodule(norm)).__name__


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@torch.inference_mode()
def test_fast_products_are_near(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "fast_matmul", FAST_PRODUCTS)
    source = Checkpoint(made(model_type, tmp_path))
    family = FAMILIES[model_type]
    rows = torch.randint(3, 128, (10, 48), generator=torch.Generator().manual_seed(1))
    runner = Runner(source, family, rows, torch.device("cpu"))
    for block in load_blocks(source, family):
        live = runner.enter(block)
        runner.leave(live.record_original(groups_of(live)))
    wanted, found = last_hidden(tmp_path, rows), hidden(runner, "original")
    lost = (found - wanted).square().mean()
    assert lost < 1e-3 * wanted.square().mean()
    # Attention has a bfloat16 of its own, but for Gemma 2's; products only where the CPU has them.
    assert lost > 0 or (model_type == "gemma2" and not torch.cpu._is_amx_tile_supported())


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@torch.inference_mode()
def test_a_smoothed_block_computes_the_same(model_type: str, tmp_path: Path) -> None:
    """The family's table of what may be rescaled, held against the real modules."""
    from packhorse.quantize.methods import smoothing

    source = Checkpoint(made(model_type, tmp_path))
    family = FAMILIES[model_type]
    rows = torch.randint(3, 128, (4, 48), generator=torch.Generator().manual_seed(1))
    runner = Runner(source, family, rows, torch.device("cpu"))
    for block in load_blocks(source, family):
        live = runner.enter(block)
        live = live.record_original(groups_of(live))
        pairs = list(smoothing.pairs(live.module, family))
        assert len(pairs) >= (1 if family.experts else 3)
        for pair in pairs:
            width = smoothing.weight_of(live.module, pair.layers[0]).shape[1]
            factors = torch.linspace(0.5, 2, width)
            smoothing.apply(live.module, family, pair, factors)
        runner.leave(live)
    torch.testing.assert_close(
        hidden(runner, "quantized"), hidden(runner, "original"), rtol=1e-3, atol=1e-4
    )


def test_first_hidden_states_are_in_the_store_before_the_next_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they can go to files."""
    monkeypatch.setattr(runner_module, "TOKENS_AT_ONCE", 48)
    seen: list[int] = []

    class Watched(runner_module.InputRecorder):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
            seen.append(len(list((tmp_path / "offload").glob("*"))))
            return super().forward(hidden_states, *args, **keywords)

    monkeypatch.setattr(runner_module, "InputRecorder", Watched)
    source = Checkpoint(made("llama", tmp_path / "model"))
    rows = torch.randint(3, 128, (3, 48), generator=torch.Generator().manual_seed(1))
    store = ActivationStore(0, tmp_path / "offload")
    Runner(source, FAMILIES["llama"], rows, torch.device("cpu"), store)
    assert sorted(set(seen)) == [0, 2, 4], "both models' of a batch before the next one"


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@torch.inference_mode()
def test_positions_and_masks_are_held_once(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "TOKENS_AT_ONCE", 48)
    source = Checkpoint(made(model_type, tmp_path))
    rows = torch.randint(3, 128, (5, 48), generator=torch.Generator().manual_seed(1))
    runner = Runner(source, FAMILIES[model_type], rows, torch.device("cpu"))
    assert runner.batches == 5
    first, *others = (runner.keywords(1, number) for number in range(5))
    assert first["position_embeddings"] is not None
    for other in others:
        for name, value in first.items():
            parts = value if isinstance(value, tuple) else (value,)
            more = other[name] if isinstance(value, tuple) else (other[name],)
            assert all(a is b for a, b in zip(parts, more, strict=True)), name


@torch.inference_mode()
def test_what_layers_were_given_is_let_go_once_it_is_looked_at(tmp_path: Path) -> None:
    """What a block's memory is made of: never more than right after the original ran."""
    source, family = Checkpoint(made("llama", tmp_path)), FAMILIES["llama"]
    rows = torch.randint(3, 128, (4, 48), generator=torch.Generator().manual_seed(1))
    store = ActivationStore()
    runner = Runner(source, family, rows, torch.device("cpu"), store)
    live = runner.enter(next(load_blocks(source, family)))
    before = store.bytes_in_memory
    live = live.record_original(groups_of(live))
    held = [store.bytes_in_memory]
    for group in groups_of(live):
        live.statistics([group])
        held.append(store.bytes_in_memory)
    assert held == sorted(held, reverse=True)
    runner.leave(live)
    assert store.bytes_in_memory == before < held[-1]


@torch.inference_mode()
def test_error_compensation_brings_later_blocks_nearer(tmp_path: Path) -> None:
    source = Checkpoint(made("llama", tmp_path))
    family = FAMILIES["llama"]
    rows = torch.randint(3, 128, (16, 64), generator=torch.Generator().manual_seed(1))
    method = gptq.Gptq(Scheme(QuantizationArgs(3, 32)))
    wanted = last_hidden(tmp_path, rows)
    errors = []
    for compensated in (False, True):
        runner = Runner(source, family, rows, torch.device("cpu"))
        for block in load_blocks(source, family):
            live = runner.enter(block)
            if compensated:
                live = live.record_original(groups_of(live))
            for group in family.fused:
                seen = live.statistics([group])[group[0]]
                for name in group:
                    rounded = method.quantize(live.weight(name), seen, torch.float32)
                    live.weight(name).copy_(rounded.weight.dequantize())
            runner.leave(live)
        errors.append((hidden(runner, "quantized") - wanted).square().mean().item())
    assert errors[1] < 0.9 * errors[0]


@torch.inference_mode()
def test_the_range_of_keys_and_values_is_what_attention_is_given(tmp_path: Path) -> None:
    source = Checkpoint(made("qwen3", tmp_path))
    family = FAMILIES["qwen3"]
    rows = torch.randint(3, 128, (4, 48), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    cache = model(rows, use_cache=True).past_key_values
    runner = Runner(source, family, rows, torch.device("cpu"))
    for block in load_blocks(source, family):
        live = runner.enter(block)
        key, value = live.key_value_range()
        layer = cache.layers[block.index]
        assert key == pytest.approx(layer.keys.abs().max().item(), rel=1e-4)
        assert value == pytest.approx(layer.values.abs().max().item(), rel=1e-4)
        runner.leave(live)
