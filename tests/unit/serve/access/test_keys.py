"""Keys files: what is taken, what is refused with which words, and what a change does."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr
from typer.testing import CliRunner

from packhorse.serve.access.keys import Keys, entry_of, new_key, read_keys
from packhorse.serve.cli import app
from packhorse.serve.errors import Forbidden, StartupError, Unauthenticated
from packhorse.serve.messages import ANONYMOUS, SCOPES
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.settings import load
from packhorse.serve.settings.auth import AuthSettings

GOOD = {"name": "batch", "sha256": hashlib.sha256(b"ph-good").hexdigest()}
OTHER = {"name": "other", "sha256": hashlib.sha256(b"ph-other").hexdigest()}


TICKS = itertools.count(1)


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def write(path: Path, entries: Iterable[Any]) -> Path:
    path.write_text(yaml.safe_dump(list(entries)))
    # Two writes within one tick of the file system's clock, of the same size, look like one.
    os.utime(path, ns=(0, next(TICKS) * 10**9))
    return path


def test_an_entry_becomes_a_caller(tmp_path: Path) -> None:
    entry = {
        **GOOD,
        "tenant": "acme",
        "scopes": ["inference", "metrics"],
        "adapters": ["clinic"],
        "quotas": {"max_concurrent": 3, "tokens_per_minute": 1000, "requests_per_minute": 60},
    }
    path = write(tmp_path / "keys.yaml", [entry, OTHER])
    keys = Keys(AuthSettings(keys_file=path))
    caller = keys.caller(b"Bearer ph-good")
    assert (caller.name, caller.tenant) == ("batch", "acme")
    assert caller.scopes == {"inference", "metrics"}
    assert caller.adapters == {"clinic"}
    quotas = (caller.max_concurrent, caller.tokens_per_minute, caller.requests_per_minute)
    assert quotas == (3, 1000, 60)
    plain = keys.caller(b"bearer  ph-other")
    assert (plain.tenant, plain.scopes, plain.adapters) == ("other", {"inference"}, None)
    path.write_text(json.dumps([GOOD]))  # JSON is YAML
    assert Keys(AuthSettings(keys_file=path)).caller(b"Bearer ph-good").name == "batch"


@pytest.mark.parametrize(
    ("header", "message", "reason"),
    [
        (None, "needs an API key", "missing"),
        (b"", "not understood", "malformed"),
        (b"Bearer", "not understood", "malformed"),
        (b"Basic cGg6cGg=", "not understood", "malformed"),
        (b"Bearer ph-wrong", "no such API key", "unknown"),
        (b"Bearer " + GOOD["sha256"].encode(), "no such API key", "unknown"),
        (b"Bearer \xff\xfe", "no such API key", "unknown"),
    ],
)
def test_without_a_known_key_nobody_comes_in(
    tmp_path: Path, header: bytes | None, message: str, reason: str
) -> None:
    metrics = ServerMetrics()
    keys = Keys(AuthSettings(keys_file=write(tmp_path / "keys.yaml", [GOOD])), metrics=metrics)
    with pytest.raises(Unauthenticated, match=message) as caught:
        keys.caller(header)
    assert "send `Authorization: Bearer KEY`" in caught.value.message
    assert "ph-" not in caught.value.message
    assert metrics.auth_failures.labels(reason)._value.get() == 1


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([{**GOOD, "scopes": ["infer"]}], "entry 1: scopes.0: .*'inference'"),
        ([GOOD, {**OTHER, "scope": ["admin"]}], "entry 2: scope: there is no such field; .*scopes"),
        ([{**GOOD, "quotas": {"rpm": 1}}], "entry 1: quotas.rpm: .*requests_per_minute"),
        ([{**GOOD, "quotas": {"max_concurrent": 0}}], "quotas.max_concurrent: .*greater than or"),
        ([{"name": "x"}], "entry 1: sha256: is missing"),
        ([{**GOOD, "sha256": "ph-plain-key"}], "entry 1: sha256: must be the key's hash"),
        ([{**GOOD, "name": "a b"}], "entry 1: name: must be 1 to 64"),
        ([{**GOOD, "name": "-"}], "entry 1: name: must be 1 to 64"),
        ([GOOD, {**OTHER, "name": "batch"}], "entries 1 and 2 have the same name"),
        ([GOOD, {**GOOD, "name": "b2"}], "entries 1 and 2 have the same sha256"),
        (["ph-plain-key"], "entry 1: the entry: must be a mapping"),
        ([], "a list of at least one key"),
        ({"keys": [GOOD]}, "a list of at least one key"),
        ("[" * 10_000, "not valid YAML"),
        ("- 2020-13-45", "not valid YAML"),
        ("[", "line [12]: not valid YAML"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(
    tmp_path: Path, document: Any, message: str
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    with pytest.raises(StartupError, match=message) as caught:
        Keys(AuthSettings(keys_file=path))
    assert str(path) in str(caught.value)
    assert "plain-key" not in str(caught.value)


def test_a_missing_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file"):
        read_keys(tmp_path / "none.yaml")


def test_a_changed_file_is_read_again_but_not_at_every_request(tmp_path: Path) -> None:
    clock = Clock()
    path = write(tmp_path / "keys.yaml", [GOOD])
    keys = Keys(AuthSettings(keys_file=path), clock=clock)
    write(path, [OTHER])
    assert keys.caller(b"Bearer ph-good").name == "batch"  # within the second
    clock.now_s = 1.0
    with pytest.raises(Unauthenticated):
        keys.caller(b"Bearer ph-good")
    assert keys.caller(b"Bearer ph-other").name == "other"


@pytest.mark.parametrize("broken", ["[", "", "- name: x\n", None])
def test_a_broken_new_file_keeps_the_old_keys_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    clock = Clock()
    path = write(tmp_path / "keys.yaml", [GOOD])
    metrics = ServerMetrics()
    keys = Keys(AuthSettings(keys_file=path), clock=clock, metrics=metrics)
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    for _ in range(3):
        clock.now_s += 2
        assert keys.caller(b"Bearer ph-good").name == "batch"
        with pytest.raises(Unauthenticated):
            keys.caller(None)
    assert metrics.key_reload_failures._value.get() == 1
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "The keys stay as they were" in errors[0].getMessage()
    write(path, [OTHER])
    clock.now_s += 2
    assert keys.caller(b"Bearer ph-other").name == "other"


@pytest.mark.parametrize(
    ("without_keys", "said"),
    [
        (None, "is inference: everybody who reaches this server may infer and read /metrics; oper"),
        ("loopback", "is loopback: everybody on this machine may infer"),
        ("everything", "is everything: everybody who reaches this server may use all of it, oper"),
    ],
)
def test_without_keys_everybody_is_anonymous_and_the_log_says_who_may_do_what(
    caplog: pytest.LogCaptureFixture, without_keys: Any, said: str
) -> None:
    keys = Keys(AuthSettings(**({"without_keys": without_keys} if without_keys else {})))
    assert keys.caller(None) is ANONYMOUS
    assert keys.caller(b"Bearer whatever") is ANONYMOUS
    assert keys.without_keys == (without_keys or "inference")
    assert said in caplog.text


def test_one_key_from_the_environment_is_no_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key()
    monkeypatch.setenv("PACKHORSE_AUTH__API_KEY", key)
    settings = load(None, {})
    assert key not in repr(settings)
    keys = Keys(settings.auth)
    assert keys.without_keys is None
    caller = keys.caller(b"Bearer " + key.encode())
    assert caller.scopes == {"inference", "metrics"}
    with pytest.raises(Forbidden, match=r"the key of auth\.admin_key"):
        keys.check_scope(caller, "admin")
    with pytest.raises(Unauthenticated):
        keys.caller(b"Bearer " + key[:-1].encode())


def test_operators_have_a_key_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    key, admin_key = new_key(), new_key()
    monkeypatch.setenv("PACKHORSE_AUTH__ADMIN_KEY", admin_key)
    alone = Keys(load(None, {}).auth)
    assert alone.caller(b"Bearer " + admin_key.encode()).scopes == set(SCOPES)
    with pytest.raises(Unauthenticated):
        alone.caller(None)
    monkeypatch.setenv("PACKHORSE_AUTH__API_KEY", key)
    settings = load(None, {})
    assert admin_key not in repr(settings)
    both = Keys(settings.auth)
    user, operator = (both.caller(b"Bearer " + each.encode()) for each in (key, admin_key))
    assert "admin" not in user.scopes
    assert operator.scopes == set(SCOPES)
    assert user.tenant != operator.tenant
    monkeypatch.setenv("PACKHORSE_AUTH__API_KEY", f"{admin_key}\n")
    with pytest.raises(StartupError, match="are the same") as caught:
        Keys(load(None, {}).auth)
    assert admin_key not in str(caught.value)


@pytest.mark.parametrize("around", ["{}\n", "{}\r\n", " {}", "\t{} \n", "\n\n{}"])
@pytest.mark.parametrize("name", ["api_key", "admin_key"])
def test_white_space_around_a_key_is_left_out_and_told(
    caplog: pytest.LogCaptureFixture, name: str, around: str
) -> None:
    key = new_key()
    keys = Keys(AuthSettings(**{name: SecretStr(around.format(key))}))
    assert keys.caller(b"Bearer " + key.encode()).scopes >= {"inference"}
    assert f"auth.{name} has white space or an end of line around it" in caplog.text
    assert key not in caplog.text
    caplog.clear()
    Keys(AuthSettings(**{name: SecretStr(key)}))
    assert "white space" not in caplog.text


@pytest.mark.parametrize(
    "key",
    ["", "\n", "short-key", "short-key".ljust(30), "a key with blanks in it", "schlüssel" * 4,
     "0123456789\nabcdef", "0123456789\tabcdef", "0123456789\0abcdef", "0123456789\x7fabcdef"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["api_key", "admin_key"])
def test_a_poor_key_is_refused_without_being_shown(name: str, key: str) -> None:
    with pytest.raises(StartupError, match=f"auth.{name} must be at least 16 ASCII") as caught:
        Keys(AuthSettings(**{name: SecretStr(key)}))
    assert not key.strip() or key not in str(caught.value)


def test_no_secret_of_a_header_ends_with_a_line(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        'tracing: {headers: {api-key: "  0123abc\\n"}}\ncache: {secret: "0123456789abcdef\\r\\n"}'
    )
    settings = load(path, {})
    assert settings.tracing.headers["api-key"].get_secret_value() == "0123abc"
    assert settings.cache.secret is not None
    assert settings.cache.secret.get_secret_value() == "0123456789abcdef"
    for text in ('tracing: {headers: {api-key: "01\\n23"}}', 'tracing: {headers: {api-key: "\\n"}}',
                 'cache: {secret: "0123456789abcde\\n"}'):  # fmt: skip
        path.write_text(text)
        with pytest.raises(StartupError, match=r"printable ASCII|at least 16"):
            load(path, {})


def test_settings_never_show_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("auth: {api_key: [ph-secret]}")
    with pytest.raises(StartupError, match=r"auth\.api_key") as caught:
        load(path, {})
    assert "ph-secret" not in str(caught.value)


def test_a_key_and_a_file_exclude_each_other(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.yaml", [GOOD])
    for name in ("api_key", "admin_key"):
        with pytest.raises(StartupError, match=rf"keys_file and auth\.{name} are set"):
            Keys(AuthSettings(keys_file=path, **{name: SecretStr(new_key())}))


def test_a_missing_scope_is_forbidden_with_the_scope_that_is_needed(tmp_path: Path) -> None:
    keys = Keys(AuthSettings(keys_file=write(tmp_path / "keys.yaml", [GOOD])))
    caller = keys.caller(b"Bearer ph-good")
    keys.check_scope(caller, "inference")
    with pytest.raises(Forbidden, match="'batch' has the scopes inference, and this needs admin"):
        keys.check_scope(caller, "admin")


def test_a_fresh_key_opens_what_its_entry_says(tmp_path: Path) -> None:
    runner = CliRunner()
    options = ["--name", "batch", "--tenant", "acme", "--scope", "inference", "--scope", "metrics",
               "--adapter", "clinic", "--tokens-per-minute", "500"]  # fmt: skip
    result = runner.invoke(app, ["keys", "new", *options])
    assert result.exit_code == 0
    key = result.stderr.rpartition(" ")[2].strip()
    assert key not in result.stdout
    path = tmp_path / "keys.yaml"
    path.write_text(result.stdout + entry_of(new_key(), name="second"))
    caller = Keys(AuthSettings(keys_file=path)).caller(f"Bearer {key}".encode())
    assert (caller.name, caller.tenant, caller.tokens_per_minute) == ("batch", "acme", 500)
    assert caller.scopes == {"inference", "metrics"}
    again = runner.invoke(app, ["keys", "new", "--name", "batch"])
    assert again.stderr != result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "a b"], "name: must be 1 to 64"),
        (["--name", "x", "--scope", "infer"], "scopes.0"),
        (["--name", "x", "--tokens-per-minute", "0"], "quotas.tokens_per_minute"),
    ],
)
def test_a_key_that_no_file_would_take_is_not_made(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["keys", "new", *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "ph-" not in result.output
