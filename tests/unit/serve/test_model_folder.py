"""Where a model is: a folder here, or one commit of a hub's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from packhorse.serve.engines.model_folder import Found, Model
from packhorse.serve.errors import StartupError
from packhorse.serve.settings.engine import EngineSettings
from tests.hub import COMMITS, Hub, running_hub

NAME = "organisation/model"
TOKEN = "hf_secretOfSomebody"
ONE, TWO = COMMITS["one"], COMMITS["two"]


def files(weights: bytes) -> dict[str, bytes]:
    return {
        "config.json": b"{}", "tokenizer.json": weights + b" tokens", "model.safetensors": weights,
        "pytorch_model.bin": weights * 2,
    }  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Its main branch is at ONE, `new` at TWO."""
    monkeypatch.chdir(tmp_path)  # no folder here has the name
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        pattern = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
        hub.push(ONE, files(b"old"))
        hub.push(TWO, files(b"new"), "new")
        yield hub


def model(name: str = NAME, **settings: Any) -> Model:
    return Model(name, EngineSettings.model_validate(settings))


def weights(found: Found) -> bytes:
    return (found.folder / "model.safetensors").read_bytes()


def test_a_server_keeps_to_one_commit(hub: Hub) -> None:
    served = model()
    first = served.found()
    assert (weights(first), first.commit) == (b"old", ONE)
    assert not (first.folder / "pytorch_model.bin").exists()
    hub.branches["main"] = TWO
    asked = len(hub.asked)
    assert served.found() is first
    assert len(hub.asked) == asked
    assert weights(model().found()) == b"new", "the next server's"


def test_a_cache_that_was_emptied_gets_the_same_commit(hub: Hub, tmp_path: Path) -> None:
    served = model()
    served.found()
    hub.branches["main"] = TWO
    shutil.rmtree(tmp_path / "cache")
    again = served.found()
    assert (weights(again), again.commit) == (b"old", ONE)


@pytest.mark.parametrize("revision", ["new", TWO])
def test_a_revision_is_honoured(hub: Hub, revision: str) -> None:
    found = model(revision=revision).found()
    assert (weights(found), found.commit) == (b"new", TWO)


def test_a_revision_that_is_not_there_is_told(hub: Hub) -> None:
    with pytest.raises(StartupError, match=r"organisation/model .* at revision old: .*Revision"):
        model(revision="old").found()


def test_the_tokenizer_may_be_of_another_revision(hub: Hub) -> None:
    served = model(tokenizer_revision="new")
    found = served.found()
    assert weights(found) == b"old"
    tokenizer = Path(found.arguments["tokenizer"])
    assert (tokenizer / "tokenizer.json").read_bytes() == b"new tokens"
    assert not (tokenizer / "model.safetensors").exists(), "nobody needs them"
    assert found.others == (tokenizer,), "which decides answers, too"
    hub.branches["new"] = ONE
    assert served.found().arguments == found.arguments


def test_what_else_comes_from_a_hub_keeps_to_its_commit_too(hub: Hub, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name, content in files(b"mine").items():
        (here / name).write_bytes(content)
    draft = {"method": "draft_model", "model": NAME, "revision": "new"}
    others = dict.fromkeys(("tokenizer", "hf_config_path", "generation_config"), NAME)
    served = model(str(here), **others, speculative_config=draft)
    found = served.found()
    assert (found.folder, found.commit) == (here, None)
    assert set(found.arguments) == {*others, "speculative_config"}
    assert found.arguments["tokenizer"].endswith(ONE)
    speculative = found.arguments["speculative_config"]
    assert speculative["method"] == "draft_model"
    assert "revision" not in speculative
    assert (Path(speculative["model"]) / "model.safetensors").read_bytes() == b"new"


def test_folders_beside_the_model_decide_answers_too(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    found = model(tokenizer=str(tmp_path / "tokens"), generation_config="vllm").found()
    assert found.others == (tmp_path / "tokens",)


def test_downloads_go_where_they_are_wanted(hub: Hub, tmp_path: Path) -> None:
    found = model(download_dir=tmp_path / "there").found()
    assert found.folder.is_relative_to(tmp_path / "there")
    assert not (tmp_path / "cache").exists()


def test_a_token_is_sent_and_never_told(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.token = "hf_anotherOne"
    with pytest.raises(StartupError) as caught:
        model(hf_token=TOKEN).found()
    assert "401" in str(caught.value)
    error: BaseException | None = caught.value
    while error is not None:
        assert TOKEN not in repr(error)
        error = None if error.__suppress_context__ else error.__cause__ or error.__context__
    hub.token = TOKEN
    with caplog.at_level("DEBUG"):
        assert weights(model(hf_token=f" {TOKEN}\n").found()) == b"old"
    assert TOKEN not in caplog.text
    assert TOKEN not in repr(EngineSettings(hf_token=TOKEN))  # type: ignore[arg-type]
    assert TOKEN not in EngineSettings(hf_token=TOKEN).model_dump_json()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["HF_TOKEN", None])
def test_other_tokens_are_not_told_either(
    hub: Hub, name: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the environment, or stored by a login."""
    if name is not None:
        monkeypatch.setenv(name, TOKEN)
    else:
        (tmp_path / "token").write_text(TOKEN)
    hub.token = "hf_anotherOne"
    with pytest.raises(StartupError) as caught:
        model().found()
    assert TOKEN not in str(caught.value)
    hub.token = TOKEN
    assert weights(model().found()) == b"old"


@pytest.mark.parametrize("token", ["", "hf_with blank", "hf_ümlaut", "a\nb"])
def test_a_token_that_cannot_be_sent_is_refused_without_telling_it(token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        EngineSettings(hf_token=token)  # type: ignore[arg-type]


@pytest.mark.parametrize("revision", [None, "main", ONE])
def test_without_a_network_what_was_downloaded_is_served(
    hub: Hub, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(revision="main").found()
    asked = len(hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = model(revision=revision).found()
    assert (weights(found), found.commit) == (b"old", ONE)
    assert len(hub.asked) == asked


HERE = [
    ({"revision": "main"}, "engine.revision=main has no effect on"),
    ({"tokenizer_revision": "v1"}, "engine.tokenizer_revision=v1 has no effect on"),
    ({"tokenizer": "/here", "tokenizer_revision": "v1"}, "has no effect on /here"),
    ({"download_dir": "/tmp/x"}, "engine.download_dir=/tmp/x has no effect"),
]


@pytest.mark.parametrize(("settings", "told"), HERE, ids=str)
def test_what_has_no_effect_on_a_folder_is_refused(
    tmp_path: Path, settings: dict[str, str], told: str
) -> None:
    with pytest.raises(StartupError, match=told):
        model(str(tmp_path), **settings).found()


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="is not a folder; give a model folder or a hub name"):
        model(str(tmp_path / "none")).found()
    with pytest.raises(StartupError, match="has no config"):
        model(str(tmp_path)).found()
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(StartupError, match=r"has no \*.safetensors weights"):
        model(str(tmp_path)).found()
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert model(str(tmp_path)).found() == Found(tmp_path)
