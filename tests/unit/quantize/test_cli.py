"""The command line: exit codes and messages that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from packhorse.quantize.cli import app
from packhorse.quantize.errors import BadInput
from packhorse.quantize.settings import Settings


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


def test_reports_are_compared_in_a_table_on_a_page_and_as_json(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / name for name in ("a", "b")]
    for out in outs:
        alone = ("--no-quality", "--no-verify")
        quantize("model", tiny_checkpoint, "--method", "rtn", "--out", out, *alone)
    shown = quantize("report", *outs, "--html", tmp_path / "page.html")
    assert shown.exit_code == 0, shown.output
    assert "not measured" in shown.output
    assert "<svg" in (tmp_path / "page.html").read_text()
    rows = json.loads(quantize("report", *outs, "--json").stdout)
    assert [row["name"] for row in rows] == ["a", "b"]
    refused = quantize("report", tiny_checkpoint)
    assert refused.exit_code == 2
    assert "has no quantize_report.json" in refused.stderr
    unwritable = quantize("report", outs[0], "--html", tmp_path / "no" / "page.html")
    assert unwritable.exit_code == 2
    assert "cannot be written" in unwritable.stderr


def test_what_a_run_that_was_cut_short_left_is_said_with_its_error(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (
        "model", tiny_checkpoint, "--method", "rtn", "--out", tmp_path / "out", "--no-quality",
        "--no-verify",
    )  # fmt: skip

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("packhorse.quantize.output.workspace.Workspace.finish_weights", interrupted)
        stopped = quantize(*arguments)
    assert stopped.exit_code == 130
    assert "Interrupted. 4 finished steps are kept" in stopped.stderr
    again = quantize(*arguments)
    assert again.exit_code == 2
    assert "cut short after 4 steps" in again.stderr
    assert quantize(*arguments, "--resume").exit_code == 0


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_device_that_is_not_there_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused = quantize(
        "model", tiny_checkpoint, "--method", "rtn", "--out", tmp_path / "out", "--device", device
    )
    assert refused.exit_code == 2
    assert "--device" in refused.stderr


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [("--row-tokens", "--sequence-length", "600"), ("--spill-above", "--offload-limit", "0.5")],
)
def test_an_option_with_its_old_name_is_taken_with_a_warning(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, value: str
) -> None:
    taken: list[Settings] = []

    def decide(settings: Settings) -> None:
        taken.append(settings)
        raise BadInput("Enough.")

    monkeypatch.setattr("packhorse.quantize.run.decide", decide)
    command = ("model", tiny_checkpoint, "--method", "gptq", "--plan")
    renamed, current = (quantize(*command, option, value) for option in (old, new))
    assert f"warning: {old} is now called {new}" in renamed.stderr
    assert "warning" not in current.stderr
    assert taken[0] == taken[1] != Settings(str(tiny_checkpoint), Path(), "gptq")
    both = quantize(*command, new, value, old, "7")
    assert f"warning: {old}" in both.stderr
    assert taken[2] == taken[1], "the new name wins"
    assert old not in quantize("model", "--help").stdout
    assert new in quantize("model", "--help").stdout
