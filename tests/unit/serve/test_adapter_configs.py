"""adapter_config.json, made by hand: what makes no sense is refused with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from packhorse.serve.adapters.formats import check
from packhorse.serve.errors import Invalid
from tests.conftest import DEMO
from tests.unit.serve.adapter_makers import CONFIG, LIMITS, Q0, ada, made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": None}, "has no peft_type"),
        ({"peft_type": "BOTTLENECK"}, "peft_type='BOTTLENECK'.*LORA and ADALORA; train it again"),
        ({"peft_type": ["LORA"]}, "LORA and ADALORA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"target_parameters": ["experts.w1"]}, "not Linear layers"),
        ({"monteclora_config": {"num_samples": 2}}, "MonteCLoRA"),
        ({"kasa_config": {}}, "KaSA"),
        ({"arrow_config": {"top_k": 2}}, "chooses among adapters"),
        ({"velora_config": {"num_groups": 2}}, "VeLoRA"),
        ({"init_lora_weights": "corda"}, "'corda'.*changed base"),
        ({"init_lora_weights": "loftq"}, "'loftq'.*changed base"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga'.*changed base"),
        ({"init_lora_weights": "PiSSA_niter_4"}, "'PiSSA_niter_4'.*changed base"),
        ({"use_newlora": True}, "'use_newlora'=True.*does not know.*remove it"),
        ({"newlora_config": {"a": 1}}, "'newlora_config'.*does not know"),
        ({"r": 0}, "r=0.*from 1 up"),
        ({"r": True}, "r=True.*from 1 up"),
        ({"r": "8"}, "r='8'.*from 1 up"),
        ({"r": 4, "rank_pattern": {"q_proj": 0}}, "rank_pattern.*=0.*from 1 up"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern.*must be an object"),
        ({"rank_pattern": {"(q": 4}}, "'\\(q', which could take long"),
        ({"rank_pattern": {"[z-a]": 4}}, "not a regular expression"),
        ({"rank_pattern": {"(.*)*x": 4}}, "take long"),
        ({"rank_pattern": {".*.*.*x": 4}}, "take long"),
        ({"rank_pattern": {"(a|a)" * 30: 4}}, "take long"),
        ({"rank_pattern": {"((a|b)|c)": 4}}, "take long"),
        ({"rank_pattern": {"(?=a)": 4}}, "take long"),
        ({"rank_pattern": {r"(a)\1": 4}}, "take long"),
        ({"alpha_pattern": {"q" * 300: 4}}, "alpha_pattern.*take long"),
        ({"alpha_pattern": {f".*{n}": 4 for n in range(17)}}, "more than 16 keys"),
        ({"alpha_pattern": {f"x{n}": 4 for n in range(5000)}}, "5000 keys, above the limit"),
        ({"lora_alpha": None}, "lora_alpha=None.*must be a number"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000.*must be a number"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.*must be a number"),
        ({"r": 5}, "rank 4 in adapter_model.safetensors and 5 in adapter_config.json"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_cannot_be_served(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(Invalid, match=message) as caught:
        check(made(tmp_path / "source", None, **values), LIMITS)
    assert len(caught.value.message) < 700


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"lora_alpha": NaN}', "NaN is not a JSON number"),
        (b"[]", "does not hold a JSON object"),
        (b" " * (8 * 2**20 + 1), "above the limit of 8388608 bytes"),
        (None, "has no adapter_config.json.*save_pretrained"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_broken_config(tmp_path: Path, text: bytes | None, message: str) -> None:
    source = made(tmp_path / "source")
    if text is None:
        (source / CONFIG).unlink()
    else:
        (source / CONFIG).write_bytes(text)
    with pytest.raises(Invalid, match=message):
        check(source, LIMITS)


def test_a_whole_model_is_no_adapter() -> None:
    with pytest.raises(Invalid, match="looks like a whole model"):
        check(DEMO / "model", LIMITS)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (ada(init_r=0), "init_r=0.*from 1 up"),
        (ada(lora_alpha=0), "must be above 0"),
        (ada(rows=2), "has rank 2 in .* says 3 of 3"),
        (ada(rank_pattern={f"{Q0}.lora_E": [True, False]}), "a list of init_r=3 times"),
        (ada(rank_pattern={f"{Q0}.lora_E": [1, 1, 0]}), "a list of init_r=3 times"),
        (ada(rank_pattern={Q0: [True, True, True]}), "under a module's name with .lora_E"),
        (ada(rank_pattern=[True]), "under a module's name"),
        (ada(rank_pattern={"x.lora_E": [True] * 3}), "names 'x', of which .* no tensors"),
        (ada(rows=0, rank_pattern={f"{Q0}.lora_E": [False] * 3}), "rank 0 and changes nothing"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_adalora_that_contradicts_itself(
    tmp_path: Path, adapter: dict[str, Any], message: str
) -> None:
    with pytest.raises(Invalid, match=message):
        check(made(tmp_path / "source", **adapter), LIMITS)


def test_adalora_without_its_singular_values(tmp_path: Path) -> None:
    adapter = ada()
    del adapter["tensors"][f"base_model.model.{Q0}.lora_E"]
    with pytest.raises(Invalid, match="lora_A and lora_B and no lora_E"):
        check(made(tmp_path / "source", **adapter), LIMITS)
