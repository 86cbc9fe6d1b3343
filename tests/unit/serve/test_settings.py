"""Where settings come from, which source wins, and what a mistake says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from packhorse.serve.errors import StartupError
from packhorse.serve.settings import Settings, answer_environment, load, shown
from packhorse.serve.settings.renamed import RENAMED
from tests.conftest import ROOT

RENAMED_SETTINGS = [
    (section, old, new) for section, names in RENAMED.items() for old, new in names.items()
]


def test_flags_beat_environment_beats_file_beats_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("http: {port: 1, host: 0.0.0.0}\nengine: {max_num_seqs: 1}\nlog_level: debug\n")
    monkeypatch.setenv("PACKHORSE_HTTP__PORT", "2")
    monkeypatch.setenv("PACKHORSE_ENGINE__MAX_NUM_SEQS", "2")
    settings = load(path, {"model": "m", "engine": {"max_num_seqs": 3}})
    assert settings.engine.max_num_seqs == 3
    assert settings.http.port == 2
    assert settings.http.host == "0.0.0.0"
    assert settings.log_level == "debug"
    assert settings.service.drain_timeout_s == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http: {prot: 1}", "http.prot"),
        ("http: {port: 70000}", "http.port = 70000"),
        ("engine: {kv_cache_dtype: int3}", "engine.kv_cache_dtype"),
        ("http: [", "cannot be read"),
    ],
)
def test_a_mistake_names_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(StartupError, match=message.replace(".", r"\.")):
        load(path, {})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("auth: {apikey: SEKRET}", "auth.apikey"),
        ("auth: SEKRET", "auth"),
        ("auth: {api_key: [SEKRET]}", "auth.api_key"),
        ("cache: {secrets: SEKRET}", "cache.secrets"),
        ("tracing: {header: {authorization: SEKRET}}", "tracing.header"),
        ('tracing: {headers: {authorization: "SEKRET\\nx"}}', "value of authorization is not of"),
        ("tracing: {headers: {Authorization: SEKRET}}", "the name 'Authorization' is not of"),
        ('tracing: {endpoint: "http://me:SEKRET@host:4317"}', "would be logged"),
    ],
)
def test_a_mistake_shows_no_secret(tmp_path: Path, text: str, place: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(StartupError) as caught:
        load(path, {})
    assert place in str(caught.value)
    assert "SEKRET" not in str(caught.value)


def test_a_tracer_that_the_environment_switches_off_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text('tracing: {endpoint: "http://127.0.0.1:4317"}')
    load(path, {})
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with pytest.raises(StartupError, match="OTEL_SDK_DISABLED=true"):
        load(path, {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("PACKHORSE_HTTP__PROT", "did you mean PACKHORSE_HTTP__PORT"),
        ("PACKHORSE_XYZZY", "no setting PACKHORSE_XYZZY"),
    ],
)
def test_an_unknown_environment_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(StartupError, match=message):
        load(None, {})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no such file"):
        load(tmp_path / "none.yaml", {})


def test_what_of_the_environment_may_change_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole words are harmless, not parts of them."""
    for name in ("VLLM_CPU_INT4_W4A8", "VLLM_FP32_LOGITS", "VLLM_HOST_IP", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "1")
    found = answer_environment()
    assert {"VLLM_CPU_INT4_W4A8", "VLLM_FP32_LOGITS"} <= found.keys()
    assert not {"VLLM_HOST_IP", "VLLM_LOGGING_LEVEL"} & found.keys()


def from_source(source: str, values: dict[str, Any], tmp_path: Path, environment: Any) -> Settings:
    """The settings with these values (section -> name -> number) from one source."""
    if source == "flags":
        return load(None, values)
    if source == "environment":
        for section, names in values.items():
            for name, value in names.items():
                environment.setenv(f"PACKHORSE_{section}__{name}".upper(), str(value))
        return load(None, {})
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(values))
    return load(path, {})


@pytest.mark.parametrize("source", ["flags", "environment", "file"])
@pytest.mark.parametrize(("section", "old", "new"), RENAMED_SETTINGS)
def test_an_earlier_name_is_taken_with_a_warning(
    source: str, section: str, old: str, new: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = from_source(source, {section: {old: 3}}, tmp_path, monkeypatch)
    assert getattr(getattr(settings, section), new) == 3
    assert f"{section}.{old} is now called {section}.{new}" in caplog.text
    assert len(caplog.records) == 1
    told = shown(settings)[section]
    assert told[new] == 3
    assert old not in told


@pytest.mark.parametrize(("section", "old", "new"), RENAMED_SETTINGS)
def test_new_names_give_no_warning(
    section: str, old: str, new: str, caplog: pytest.LogCaptureFixture
) -> None:
    load(None, {section: {new: 3}})
    assert not caplog.records


@pytest.mark.parametrize("source", ["flags", "environment", "file"])
def test_a_setting_under_both_names_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"admission": {"max_running": 3, "max_in_engine": 3}}
    with pytest.raises(StartupError, match=r"admission\.max_in_engine are both set"):
        from_source(source, both, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("of_environment", "of_file"),
    [("max_running", "max_in_engine"), ("max_in_engine", "max_running")],
)
def test_two_sources_may_not_use_both_names(
    of_environment: str, of_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither wins: who set the new name should learn that the file still has the old one."""
    monkeypatch.setenv(f"PACKHORSE_ADMISSION__{of_environment.upper()}", "3")
    with pytest.raises(StartupError, match="both set"):
        from_source("file", {"admission": {of_file: 4}}, tmp_path, monkeypatch)


def test_sources_keep_their_order_under_an_earlier_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PACKHORSE_ADAPTERS__TURN_TOKENS", "5")
    settings = from_source("file", {"adapters": {"turn_tokens": 6}}, tmp_path, monkeypatch)
    assert settings.adapters.quantum_tokens == 5
    assert len(caplog.records) == 1, "one warning for one name"


def test_a_wrong_value_under_an_earlier_name_is_told_under_the_new_one() -> None:
    with pytest.raises(StartupError, match=r"admission\.max_in_engine = 0"):
        load(None, {"admission": {"max_running": 0}})


def test_the_warning_is_on_stderr_before_logging_is_set_up() -> None:
    code = "from packhorse.serve.settings import load; load(None, {})"
    environment = {"PATH": "/usr/bin:/bin", "PACKHORSE_ADMISSION__MAX_RUNNING": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "admission.max_in_engine" in done.stderr
    assert done.stdout == ""


def test_a_hint_names_no_earlier_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKHORSE_ADMISSION__MAX_RUNING", "1")
    with pytest.raises(StartupError) as caught:
        load(None, {})
    assert "MAX_RUNNING" not in str(caught.value)


def test_the_page_has_every_setting() -> None:
    """With its default, but for those that are unset, or depend on the machine."""
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    page = yaml.safe_load(block)
    defaults = shown(Settings())
    assert page.keys() == defaults.keys()
    for name, section in defaults.items():
        if isinstance(section, dict):
            assert page[name].keys() == section.keys(), name
            other = {key for key in section if page[name][key] != section[key]}
            assert other <= {"digests_file"}, name
    renamed = re.findall(r"^\| `(\w+)\.(\w+)` \| `\w+\.(\w+)` \|$", text, re.MULTILINE)
    assert renamed == RENAMED_SETTINGS
