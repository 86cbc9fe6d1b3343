"""What vLLM's own series say beside ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from packhorse.serve import metrics
from packhorse.serve.engines.vllm.patches.lasting_metrics import _AdapterInfo


def test_adapters_that_wait_for_their_turn_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM knows only of requests that it was given."""
    info = _AdapterInfo(4)
    info.loaded = {
        1: SimpleNamespace(lora_name="clinic@0123"),
        2: SimpleNamespace(lora_name="code@4567"),
    }
    waiting = {"clinic@0123": 2, "code@4567": 0}
    info.step(SimpleNamespace(waiting_lora_adapters=waiting, running_lora_adapters={}))
    held = {"ledger": 3}
    monkeypatch.setattr(metrics, "adapters_waiting", lambda: held)

    def named() -> tuple[str, str]:
        (family,) = info.collect()
        labels = family.samples[0].labels
        return labels["waiting_lora_adapters"], labels["running_lora_adapters"]

    assert named() == ("clinic,ledger", "clinic,code")
    held.clear()
    assert named() == ("clinic", "clinic,code")
    info.forget()
    assert named() == ("", "clinic,code")
