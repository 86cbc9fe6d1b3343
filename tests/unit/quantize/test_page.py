"""The report page: what is on it, that nothing of a report becomes markup, that it is alone."""

from __future__ import annotations

import builtins
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from packhorse.quantize.errors import BadInput
from packhorse.quantize.model.checkpoint import REPORT
from packhorse.quantize.report import page
from packhorse.quantize.report.verdict import REPORT_VERSION
from tests.unit.quantize.test_verdict import report_of

EVIL = "<script>alert(1)</script>$x_1$\"'&"


def whole(name: str = "model", **measured: Any) -> dict[str, Any]:
    """A report with every key that the page shows."""
    report = report_of(**measured)
    part = {"parameters": 100, "bytes": 50, "bits_per_weight": 4.0}
    left = {**part, "largest": [{"name": "lm_head.weight", "bytes": 40, "dtype": "BF16"}]}
    report["quality"]["measured_with"] = {"eval": {"file": "eval.jsonl", "sha256": "ab" * 32}}
    return report | {
        "report_version": REPORT_VERSION, "source": name, "method": "gptq", "group_size": 128,
        "format": "compressed-tensors",
        "plan": {"scheme": "W4A16", "symmetric": True, "kv_scales": False},
        "bytes": {"before": 1_000_000, "after": 310_000, "ratio": 0.31},
        "weights": {"before": None, "after": {**part, "quantized": part, "left_alone": left}},
        "calibration": {"files": ["text.jsonl"], "sha256": "cd" * 32, "tokens": 65536},
        "seconds": 12.5, "seed": 7, "peak_memory_bytes": 5_000_000,
        "stages": [{"name": "quantizing", "seconds": 12.5, "peak_memory_bytes": 5_000_000}],
        "weights_sha256": "ef" * 32, "versions": {"packhorse": "0.1.0"}, "notes": ["a note"],
        "layers": [
            {
                "name": f"model.layers.{block}.mlp.{kind}", "bits": 4, "relative_error": 0.01,
                "output_error": 0.002 * (block + 1),
                **({"note": "damped by 0.1"} if block == 1 else {}),
            }
            for block in range(3) for kind in ("up_proj", "down_proj")
        ],
    }  # fmt: skip


def without_plots(name: str = "model", **measured: Any) -> dict[str, Any]:
    """A report whose view has no plot: drawing takes nearly all the time of a page."""
    report = whole(name, **{"kl": None, **measured})
    report["layers"] = []
    return report


@pytest.fixture(scope="module")
def two() -> str:
    """The page of two reports."""
    return page.render([whole(), whole(kl=0.2)], ["a", "b"])


class Structure(HTMLParser):
    """What the page is made of, and whether every element is closed."""

    EMPTY = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = {"href", "src", "xlink:href", "action"}
        self.addresses += [value or "" for name, value in attrs if name in names]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_one_report_is_shown_in_full() -> None:
    text = page.render([whole()], ["made"])
    for shown in (
        "As good as the original", "100.0%", "W4A16 by Marlin", "model.layers.2.mlp.up_proj",
        "damped by 0.1", "ef" * 32, "cd" * 32, "packhorse 0.1.0", "eval.jsonl", "a note", "seed",
        "310.0 kB", "5.0 MB", "99.0%", "±", "prefers-color-scheme: dark", "2 with notes",
        "fell back",
    ):  # fmt: skip
        assert shown in text, shown
    assert "#0101" not in text  # every colour has become a variable of the page
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", text)) <= set(
        re.findall(r"--([a-z0-9-]+):", text)
    )


def test_the_page_is_whole_alone_and_without_scripts(two: str) -> None:
    structure = Structure(two)
    assert structure.open == []
    assert not {"script", "iframe", "object", "link", "img", "form"} & set(structure.tags)
    assert all(address.startswith("#") for address in structure.addresses)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", two)
    ids = re.findall(r' id="([^"]+)"', two)
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in structure.addresses} <= set(ids)


def test_nothing_of_a_report_becomes_markup() -> None:
    report = whole(EVIL)
    report["notes"] = report["calibration"]["files"] = [EVIL]
    report["method"] = report["plan"]["scheme"] = report["weights_sha256"] = EVIL
    report["proof"]["kernel"] = report["proof"]["reference"] = EVIL
    report["versions"] = {EVIL: EVIL}
    report["quality"]["after"]["score"]["by_domain"] = {EVIL: 1.0}
    report["quality"]["distance"]["computed_in"] = EVIL
    for layer in report["layers"]:
        layer["name"] += EVIL
        layer["note"] = EVIL
    text = page.render([report, without_plots()], [EVIL, "b"])
    structure = Structure(text)
    assert "script" not in structure.tags
    assert structure.open == []
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_same_reports_give_the_same_page(two: str) -> None:
    assert page.render([whole(), whole(kl=0.2)], ["a", "b"]) == two
    assert not re.search(r"\d{4}-\d\d-\d\dT", two)


def test_several_are_compared_by_what_they_have_in_common() -> None:
    nothing = without_plots(score=None, perplexity=None)
    some = [without_plots(kl=0.002), without_plots(kl=0.9), nothing]
    text = page.render(some, ["a", "b", "c"])
    assert "Not measured, so not drawn: c." in text
    assert [f">{level}</span>" in text for level in ("do not use", "not measured")] == [True, True]
    seen = without_plots()
    seen["plan"]["budget"] = 4.5
    assert page.rows([seen], ["a"])[0]["scheme"] == "W4A16, mixed to 4.5 bits"
    seen["proof"]["distance"] = {
        "kl_at_least_mean": 0.004, "positions": 640, "top1_agreement": 0.97
    }  # fmt: skip
    assert "0.004 nats over 640 positions" in page.render([seen], ["a"])
    scores = page.render([without_plots(perplexity=None), without_plots()], ["a", "b"])
    assert "Higher and further left is better." in scores
    assert "Size against quality" not in page.render([without_plots(kl=0.002), nothing], ["a", "b"])


def test_a_bare_report_is_shown_with_what_it_lacks() -> None:
    report = whole(score=None, perplexity=None, kl=None, load_check=False)
    report |= {"calibration": None, "layers": [], "notes": [], "stages": [], "seed": None}
    report |= {"weights": {"before": None, "after": None}, "peak_memory_bytes": None}
    text = page.render([report], ["made"])
    assert "Not measured: nothing in this report says" in text
    assert "<svg" not in text
    assert "was not loaded in vLLM" in text


def test_figures_of_different_files_are_not_compared_in_silence() -> None:
    other = without_plots("other")
    other["quality"]["measured_with"] = {"eval": {"file": "x", "sha256": "00"}}
    ours = without_plots()
    assert page.warnings([ours, ours]) == []
    assert len(page.warnings([ours, other])) == 2
    assert "figures cannot be compared" in page.render([ours, other], ["a", "b"])


def test_the_table_says_the_same_in_a_terminal() -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(page.table([whole(kl=0.2), whole(score=None)], ["[red]a", "b"]))
    text = console.export_text()
    for shown in ("[red]a", "look closer", "0.2", "W4A16", "100.0%", "–", "310.0 kB"):
        assert shown in text
    rows = page.rows([whole(kl=0.2)], ["a"])
    assert json.loads(json.dumps(rows))[0]["kl_mean"] == 0.2
    assert rows[0]["verdict"] == "look closer"


def test_a_folder_without_a_report_that_can_be_read_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / REPORT
    with pytest.raises(BadInput, match="give a folder that `quantize model` made"):
        page.load(tmp_path)
    path.write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        page.load(tmp_path)
    path.write_text("{}")
    with pytest.raises(BadInput, match=r"version 1, older than 2.*quantize again"):
        page.load(tmp_path)
    path.write_text('{"report_version": 99}')
    with pytest.raises(BadInput, match=r"version 99, newer than 2.*update"):
        page.load(tmp_path)
    path.write_text(json.dumps(whole()))
    assert page.load(tmp_path) == whole()


def test_folders_of_one_name_are_called_by_their_paths() -> None:
    assert page.names([Path("x/a"), Path("x/b/")]) == ["a", "b"]
    assert page.names([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]


def test_without_matplotlib_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadInput, match=r"pip install 'packhorse\[report\]'"):
        page.render([whole()], ["a"])
