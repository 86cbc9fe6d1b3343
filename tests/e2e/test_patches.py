"""Two real engines in one process, and one that runs without the patches of vLLM.

All of it happens in one child process, engines_child.py, and is looked at here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from packhorse.serve.engines.vllm.patches import PATCHES
from tests.conftest import DEMO, ROOT, start

pytestmark = pytest.mark.timeout(600)  # four engines, one of which imports vLLM twice


@pytest.fixture(scope="module")
def found(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("engines")
    result = place / "result.json"
    command = [sys.executable, "-m", "tests.e2e.engines_child", result, DEMO / "model"]
    environment = {
        **os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    with (place / "log").open("wb") as log:
        words = list(map(str, [*command, tiny_checkpoint]))
        child = start(words, ROOT, log.fileno(), environment, fresh=False)
        try:
            code = child.wait(580)
        finally:
            child.kill()
    assert code == 0, (place / "log").read_text(errors="replace")[-6000:]
    told: dict[str, Any] = json.loads(result.read_text())
    told["log"] = (place / "log").read_text(errors="replace")
    return told


def states(table: list[tuple[str, str, str]]) -> dict[str, str]:
    return {name: state for name, _, state in table}


def test_two_engines_answer_beside_each_other(found: dict[str, Any]) -> None:
    assert found["one again"] == found["one"]
    assert found["two again"] == found["two"]
    assert found["one"] != found["two"], "they are two models"
    assert all(end for _, ends in found["one"] for end in ends)
    assert found["left"] == [True, True]


def test_their_series_are_kept_apart_by_model(found: dict[str, Any]) -> None:
    for series in found["series"]:
        for metric, values in series.items():
            assert values.keys() == {"one", "two"}, metric
    tokens = found["series"][0]["vllm:generation_tokens_total"]
    assert tokens["one"] > 0
    assert tokens["two"] > 0
    assert tokens["one"] != tokens["two"]


def test_the_series_of_one_outlive_its_rebuild(found: dict[str, Any]) -> None:
    before, after = (each["vllm:generation_tokens_total"] for each in found["series"])
    assert after["two"] == 2 * before["two"], "the same answers, by two engines"
    assert after["one"] > before["one"]


def test_the_table_tells_what_is_in_use(found: dict[str, Any]) -> None:
    told = states(found["table"])
    assert told.keys() == PATCHES.keys()
    assert not [state for state in told.values() if state.startswith("left out")]
    assert told["fast_outputs"] == told["engine_watch"] == "applied"
    assert told["cpu_lora_math"] == "not needed here"
    assert "Patches of vLLM: forkserver (speed): applied; " in found["log"]


def test_without_any_speed_patch_the_answers_are_the_same(found: dict[str, Any]) -> None:
    told = states(found["plain table"])
    for name, patch in PATCHES.items():
        assert (told[name] == "left out: left out for a test") == (
            patch.kind == "speed" and name != "lora_time_slicing"
        ), name
    assert found["plain"] == found["one"]
    assert found["steps"] > 0, "the heartbeat"


def test_without_any_speed_patch_requests_end_with_their_readers_and_the_engine(
    found: dict[str, Any],
) -> None:
    assert found["plain left"] == [True, True]
    assert found["plain closed"] == "EngineDied"


def test_each_that_is_left_out_is_warned_of_once(found: dict[str, Any]) -> None:
    assert found["log"].count("The patch fast_outputs does not fit this vLLM and is left out") == 1


def test_adapters_are_refused_without_their_product(found: dict[str, Any]) -> None:
    assert found["refused"].startswith("Serving adapters on a CPU needs the patch cpu_lora_math")
    assert "Serve without adapters" in found["refused"]
