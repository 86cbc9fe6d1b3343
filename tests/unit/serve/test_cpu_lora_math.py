"""What adapters add to a layer's outputs, held to one token after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping

from packhorse.serve.engines.vllm.patches.cpu_lora_math import MaskedLora

SLOTS, RANK, INPUTS = 3, 4, 32
SCALE = 0.5


def factors(outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """As vLLM stacks them."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(SLOTS, 1, RANK, INPUTS, generator=generator)
    return a, torch.randn(SLOTS, 1, outputs, RANK, generator=generator)


def lora(adapters: list[int], slots: list[int | None], tokens: list[int]) -> MaskedLora:
    """A step in which sequences with these adapters (0: none) have so many tokens each."""
    made = MaskedLora(64, 8, "cpu")
    of_tokens = tuple(
        adapter for adapter, count in zip(adapters, tokens, strict=True) for _ in range(count)
    )
    mapping = LoRAMapping(of_tokens, tuple(adapters), is_prefill=True)
    made.update_metadata(mapping, slots, SLOTS, 100)
    return made


def expected(x: Tensor, slot_of: list[int | None], a: Tensor, b: Tensor) -> Tensor:
    rows = [
        torch.zeros(b.shape[2]) if slot is None else SCALE * (b[slot, 0] @ (a[slot, 0] @ row))
        for row, slot in zip(x, slot_of, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("adapters", "slots", "slot_of"),
    [
        ([7], [7, None, None], [0]),
        ([0, 9, 7], [7, 8, 9], [None, 2, 0]),  # the base's beside the adapter of the last slot
        ([9, 0, 0], [None, None, 9], [2, None, None]),
        ([7, 8, 9, 7, 0], [9, 7, 8], [1, 2, 0, 1, None]),
        ([0, 0], [7, 8, 9], [None, None]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_gets_its_own_adapters_share(
    adapters: list[int], slots: list[int | None], slot_of: list[int | None], dtype: torch.dtype
) -> None:
    counts = [3, 1, 2, 5, 1][: len(adapters)]
    step = lora(adapters, slots, counts)
    of_tokens = [slot for slot, count in zip(slot_of, counts, strict=True) for _ in range(count)]
    pairs = [factors(16, 0), factors(8, 1)]
    x, y = torch.randn(len(of_tokens), INPUTS), torch.randn(len(of_tokens), 24)
    wanted = y + torch.cat([expected(x, of_tokens, *pair) for pair in pairs], dim=1)
    got = y.to(dtype)
    (a_first, b_first), (a_second, b_second) = [(a.to(dtype), b.to(dtype)) for a, b in pairs]
    step.add_lora_linear(got, x.to(dtype), (a_first, a_second), (b_first, b_second), SCALE, (16, 8))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
    torch.testing.assert_close(got.float(), wanted, **close)
    untouched = [number for number, slot in enumerate(of_tokens) if slot is None]
    assert torch.equal(got[untouched], y.to(dtype)[untouched])


def test_the_head_is_left_alone_whatever_rows_it_is_asked_for() -> None:
    step = lora([8, 0], [7, None, 8], [2, 4])
    a, b = factors(16, 0)
    for rows in (2, 6):
        y = torch.randn(rows, 16)
        got = y.clone()
        step.add_lora_logits(got, torch.randn(rows, INPUTS), torch.zeros_like(a), b, SCALE)
        assert torch.equal(got, y)


def test_another_shape_of_batch_is_changed_in_place_too() -> None:
    step = lora([7, 0], [7, None, None], [2, 2])
    a, b = factors(16, 0)
    x, y = torch.randn(2, 2, INPUTS), torch.zeros(2, 2, 16)
    step.add_lora_linear(y, x, (a,), (b,), SCALE, (16,))
    flat = expected(x.view(4, INPUTS), [0, 0, None, None], a, b)
    torch.testing.assert_close(y.view(4, 16), flat, rtol=1e-4, atol=1e-4)
