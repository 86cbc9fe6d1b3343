"""The command line: exit codes and messages that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from quantize.cli import app


def quantize(*arguments: str | Path) -> Result:
    # A wide terminal, so that no message is wrapped in the middle of what a test looks for.
    return CliRunner(env={"COLUMNS": "1000"}).invoke(app, [str(word) for word in arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "nowhere", "--method", "int8", "--out", "out"), "nowhere is not a folder"),
        (
            ("model", "MODEL", "--method", "int9", "--out", "out"),
            "int9 is not known; choose one of gptq, awq, int8, fp8, rtn",
        ),
        (
            ("model", "MODEL", "--method", "rtn", "--out", "out", "--group-size", "7"),
            "32, 64 or 128",
        ),
        (
            ("model", "MODEL", "--method", "rtn", "--out", "out", "--eval", "no.jsonl"),
            "no.jsonl: no such file",
        ),
        (("model", "EMPTY", "--method", "rtn", "--out", "out"), "has no config.json"),
        (("inspect", "EMPTY"), "has no config.json"),
    ],
)
def test_a_mistake_is_exit_code_2_and_one_clear_line(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"MODEL": str(tiny_checkpoint), "EMPTY": str(tmp_path / "empty")}
    result = quantize(*(places.get(word, word) for word in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_model_then_inspect(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    alone = ("--no-quality", "--no-verify")
    made = quantize("model", tiny_checkpoint, "--method", "int8", "--out", out, *alone)
    assert made.exit_code == 0, made.output
    assert f"Wrote {out}" in made.stdout
    facts = json.loads(quantize("inspect", out, "--json").stdout)
    assert facts["quantization"] == {
        "method": "compressed-tensors", "format": "int-quantized", "weight_bits": 8,
        "group_size": None, "activation_bits": 8, "kv_cache": False,
        "type": "int", "symmetric": True, "others": [],
    }  # fmt: skip
    assert facts["report"]["method"] == "int8"
    assert "8-bit weights" in quantize("inspect", out).stdout
