"""Where settings come from, which source wins, and what a mistake says."""

from __future__ import annotations

from pathlib import Path

import pytest
from packhorse.serve.errors import StartupError
from packhorse.serve.settings import answer_environment, load


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
