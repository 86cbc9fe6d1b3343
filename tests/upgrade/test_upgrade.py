"""What version eccf297 has left is read by this one: configuration, command lines, adapter store,
results and flushes in Redis, `quantize` runs that were cut short. make_files.py says how the files
were made.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import redis
import torch
import typer
import yaml
from pydantic import BaseModel, SecretStr
from safetensors.torch import load_file
from typer.testing import CliRunner

from packhorse.quantize.cli import app as quantize_app
from packhorse.serve.cache import codec
from packhorse.serve.cli import app as serve_app
from packhorse.serve.settings import Settings, load
from tests.conftest import Server, running_server
from tests.stores import StoreServer, running_store

FILES = Path(__file__).parent / "files_eccf297"
REDIS = json.loads((FILES / "redis.json").read_text())
STORE = json.loads((FILES / "store.json").read_text())
SECRET: str = REDIS["secret"]
(EPOCHS,) = REDIS["epochs"]
"""The name of the hash that holds the flush epochs."""
EARLIER: dict[str, str] = REDIS["epochs"][EPOCHS]
TEN_YEARS_US = 10 * 365 * 86400 * 10**6

# The settings that have been renamed since, and their names now.
RENAMED = {
    "admission.max_running": "admission.max_in_engine",
    "adapters.max_running": "adapters.max_concurrent_per_adapter",
    "adapters.turn_tokens": "adapters.quantum_tokens",
    "engine.loras_per_slot": "engine.lora_oversubscription",
}
ABSENT = object()


# The configuration


def leaves(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a YAML file under their whole names."""
    for name, value in document.items():
        if isinstance(value, dict) and not prefix:
            yield from leaves(value, f"{name}.")
        else:
            yield prefix + name, value


def at(settings: Settings, name: str) -> Any:
    """The value of a setting in the form that YAML has for it; ABSENT where there is no such."""
    found: Any = settings
    for part in name.split("."):
        fields = {**type(found).model_fields, **(found.model_extra or {})}
        if part not in fields:
            return ABSENT
        found = getattr(found, part)
    return plain(found)


def plain(value: Any) -> Any:
    match value:
        case SecretStr():
            return value.get_secret_value()
        case Path():
            return str(value)
        case tuple():
            return [plain(part) for part in value]
        case dict():
            return {name: plain(part) for name, part in value.items()}
        case BaseModel():
            return {name: plain(part) for name, part in value}
    return value


def test_every_value_of_a_configuration_arrives(caplog: pytest.LogCaptureFixture) -> None:
    settings = load(FILES / "packhorse.yaml", {})
    written = dict(leaves(yaml.safe_load((FILES / "packhorse.yaml").read_text())))
    assert len(written) == 85
    assert {name: at(settings, RENAMED.get(name, name)) for name in written} == written
    for old, new in RENAMED.items():
        assert old in written
        assert f"{old} is now called {new}" in caplog.text


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_setting_is_taken_from_the_environment(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PACKHORSE_" + old.upper().replace(".", "__"), "5")
    assert at(load(None, {}), new) == 5
    assert f"{old} is now called {new}" in caplog.text


def options(command: Any, path: str) -> Iterator[tuple[str, set[str]]]:
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from options(inner, f"{path} {name}")
    else:
        names = (n for p in command.params for n in (*p.opts, *p.secondary_opts))
        yield path, {name for name in names if name.startswith("--")}


def test_every_command_and_option_is_still_there() -> None:
    earlier = json.loads((FILES / "options.json").read_text())
    assert sum(map(len, earlier.values())) > 50
    now: dict[str, set[str]] = {}
    for name, app in (("packhorse", serve_app), ("quantize", quantize_app)):
        now.update(options(typer.main.get_command(app), name))
    missing = {
        command: set(names) - now.get(command, set())
        for command, names in earlier.items()
        if not set(names) <= now.get(command, set())
    }
    assert not missing


# Servers


def write_config(folder: Path, **sections: Any) -> str:
    """A configuration on the echo engine; `folder` gets the model and the keys."""
    shutil.copytree(FILES / "model", folder / "model")
    shutil.copy(FILES / "keys.yaml", folder)
    config = {
        "model": "model",
        "auth": {"keys_file": "keys.yaml"},
        "engine": {"kind": "echo"},
        **sections,
    }
    path = folder / "packhorse.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=30)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer key-{key}-for-tests"}


def ask(http: httpx.Client, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What the cache did, and the answer."""
    response = http.post(request["path"], json=request["body"], headers=bearer(request["key"]))
    assert response.status_code == 200, response.text
    return response.headers["x-packhorse-cache"], response.json()


def holds(new: Any, old: Any) -> bool:
    """Whether an answer says all that the earlier one said; it may have more fields."""
    match old:
        case dict():
            return all(name in new and holds(new[name], part) for name, part in old.items())
        case list():
            return len(new) == len(old) and all(map(holds, new, old))
    return bool(new == old)


def state_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    }


# The adapter store


@pytest.mark.parametrize("watched", [False, True])
def test_the_adapters_of_a_store_are_served(tmp_path: Path, watched: bool) -> None:
    """Under their names, in the versions that were current, with what routes to them; also beside
    the watched folder that they came from.
    """
    if watched:
        shutil.copytree(FILES / "adapters", tmp_path / "adapters")
    store = tmp_path / ("adapters/.store" if watched else "store")
    shutil.copytree(FILES / "store", store)
    before = state_of(store)
    place = {"folder": "adapters"} if watched else {"store": "store"}
    config = write_config(tmp_path, adapters=place)
    with running_server(tmp_path, "--config", config, fresh=True) as server, client(server) as http:
        cards = http.get("/admin/adapters", headers=bearer("ops")).json()["data"]
        assert holds(sorted(cards, key=name_of), sorted(STORE["adapters"], key=name_of))
        listed = {
            model["id"] for model in http.get("/v1/models", headers=bearer("bob")).json()["data"]
        }
        assert {"model", "red", "blue"} <= listed
        for name in ("red", "blue"):
            chat = {"model": name, "messages": [{"role": "user", "content": f"hello {name}"}]}
            answer = http.post("/v1/chat/completions", json=chat, headers=bearer("anna"))
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["content"] == f"hello {name}"
        reloaded = http.post("/admin/routes/reload", headers=bearer("ops"))
        assert reloaded.status_code == 200, reloaded.text
        for text, adapter in STORE["routes"].items():
            auto = {"model": "auto", "messages": [{"role": "user", "content": text}]}
            decision = http.post("/v1/route", json=auto, headers=bearer("bob")).json()
            assert (decision["stage"], decision["adapter"]) == ("learned", adapter)
    assert_quiet(server)
    assert state_of(store) == before, "no version is written again"
    registered = json.loads((store / ".registry.json").read_bytes())
    assert {entry["digest"] for entry in registered} == {c["digest"] for c in STORE["adapters"]}


def name_of(card: dict[str, Any]) -> str:
    return str(card["name"])


def assert_quiet(server: Server) -> None:
    log = server.log()
    assert not [line for line in log.splitlines() if " ERROR " in line], log
    assert "Traceback" not in log, log


# The result cache


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreServer]:
    with running_store("redis", tmp_path) as found:
        yield found


def fill(store: StoreServer, epochs: dict[str, str]) -> redis.Redis:
    """Redis as it was left; `epochs` are those of the flushes."""
    filled = redis.Redis(port=store.port)
    for name, value in REDIS["entries"].items():
        filled.set(name, base64.b64decode(value), px=3_600_000)
    filled.hset(EPOCHS, mapping=epochs)
    return filled


def epochs_in(filled: redis.Redis) -> dict[str, str]:
    return {name.decode(): epoch.decode() for name, epoch in filled.hgetall(EPOCHS).items()}


def cached_config(tmp_path: Path, store: StoreServer) -> str:
    shutil.copytree(FILES / "store", tmp_path / "store")
    return write_config(
        tmp_path,
        adapters={"store": "store"},
        routing={"enabled": False},
        cache={
            "store": store.url,
            "secret": SECRET,
            "timeout_s": 5,
            "digests_file": "digests.json",
        },
    )


def test_results_of_before_are_right_or_not_there(tmp_path: Path, store: StoreServer) -> None:
    filled = fill(store, EARLIER)
    config = cached_config(tmp_path, store)
    with (
        running_server(tmp_path, "--config", config, cache=True, fresh=True) as server,
        client(server) as http,
    ):
        for request in REDIS["requests"]:
            mark, answer = ask(http, request)
            assert mark in ("miss", "hit")
            assert holds(answer, request["answer"])
            mark, answer = ask(http, request)
            assert mark == "hit"
            assert holds(answer, request["answer"])
        seen = http.get("/metrics", headers=bearer("ops")).text
    failures = [line for line in seen.splitlines() if "_cache_store_failures_total{" in line]
    assert all(float(line.rpartition(" ")[2]) == 0 for line in failures), failures
    assert "\npackhorse_cache_store_up 1.0" in seen or "packhorse_cache_store_up{" in seen
    assert_quiet(server)
    assert epochs_in(filled) == EARLIER, "the flushes of before are known, and no more"


def test_what_is_stored_is_read_right_or_not_at_all() -> None:
    """Also where a key should be what it was."""
    said = {
        choice["message"]["content"] if "message" in choice else choice["text"]
        for request in REDIS["requests"]
        for choice in request["answer"]["choices"]
    }
    assert len(REDIS["entries"]) == 2 * len(REDIS["requests"])
    for name, value in REDIS["entries"].items():
        digest = bytes.fromhex(name.rpartition(":")[2])
        content = codec.unseal(base64.b64decode(value), digest, SECRET.encode())
        if content is not None:
            result = codec.decode(content)
            assert {chunk.text for chunk in result.chunks} <= said
            assert holds(msgspec.to_builtins(result), msgspec.msgpack.decode(content))


def test_flushes_go_on_from_the_epochs_that_are_there(tmp_path: Path, store: StoreServer) -> None:
    """Those of a replica whose clock was ten years ahead: the clock of this one is not enough."""
    ahead = {scope: f"{int(epoch, 16) + TEN_YEARS_US:016x}" for scope, epoch in EARLIER.items()}
    filled = fill(store, ahead)
    config = cached_config(tmp_path, store)
    with (
        running_server(tmp_path, "--config", config, cache=True, fresh=True) as server,
        client(server) as http,
    ):

        def flush(scope: str) -> None:
            flushed = http.delete(f"/admin/cache{scope}", headers=bearer("ops"))
            assert flushed.status_code == 200, flushed.text

        request = REDIS["requests"][1]
        assert request["body"]["model"] == "red"
        highest = max(ahead.values())
        for query, scope in (
            ("?adapter=red", "adapter:red"),
            ("?tenant=acme", next(scope for scope in ahead if scope.startswith("tenant:"))),
            ("?model=model", "model:model"),
            ("", "all"),
        ):
            assert [ask(http, request)[0] for _ in range(2)] == ["miss", "hit"]
            flush(query)
            now = epochs_in(filled)
            assert now[scope] > highest, scope
            highest = now[scope]
            assert max(now.values()) == highest
        assert ask(http, request)[0] == "miss"
    assert_quiet(server)


# Runs of `quantize` that were cut short

VERSIONS = ("packhorse", "torch", "transformers", "safetensors")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as the runs had: it is part of what a run is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class CutShort:
    """A run in the working directory, and its command line."""

    def __init__(self, name: str) -> None:
        record = json.loads((FILES / "quantize" / f"{name}.json").read_text())
        self.command: list[str] = record["command"]
        self.tensors: dict[str, str] = record["tensors"]
        shutil.copytree(FILES / "model", "model")
        shutil.copy(FILES / "calibration.jsonl", ".")
        self.partial = Path(".made.partial")
        shutil.copytree(FILES / "quantize" / f"{name}.partial", self.partial)
        (self.partial / "checkpoint").mkdir()
        self.manifest = self.partial / "manifest.json"
        # What is asked here is whether the program goes on; with other libraries it must not.
        self.change({name: version(name) for name in VERSIONS})
        steps = json.loads(self.manifest.read_text())["steps"]
        self.finished = {
            key
            for step in steps
            for part in step["parts"]
            for key in load_file(self.partial / part["file"])
        }

    def change(self, run: dict[str, str]) -> None:
        manifest = json.loads(self.manifest.read_text())
        assert manifest["run"].keys() >= run.keys()
        manifest["run"] |= run
        self.manifest.write_text(json.dumps(manifest))

    def quantize(self, *options: str, out: str | None = None) -> str:
        """Run the command; what it said. Fails with that as its message."""
        command = [*self.command, *options]
        if out is not None:
            command[command.index("--out") + 1] = out
        done = CliRunner().invoke(quantize_app, command, env={"COLUMNS": "1000"})
        if done.exit_code:
            raise Refused(done.exit_code, done.output) from done.exception
        return done.output


class Refused(Exception):
    """A command's exit code, and what it said."""


def digests_of(folder: str) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in load_file(Path(folder) / "model.safetensors").items()
    }


@pytest.mark.parametrize("name", ["rtn", "gptq", "mixed"])
def test_a_run_that_was_cut_short_ends_in_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rtn: weights alone. gptq: with hidden states, and old names of options. mixed: with costs
    that were measured before.
    """
    monkeypatch.chdir(tmp_path)
    earlier = CutShort(name)
    said = earlier.quantize("--resume")
    assert "resumed after 2 of its steps" in said
    made = digests_of("made")
    assert made.keys() == earlier.tensors.keys()
    assert {key for key in earlier.finished if made[key] != earlier.tensors[key]} == set()
    if made != earlier.tensors:
        # This CPU rounds sums otherwise than the one that made the files: then it does so in a run
        # from the beginning, too. Rounding decides ties, so codes may be others, but no worse.
        assert name != "rtn"
        earlier.quantize(out="whole")
        assert digests_of("whole") != earlier.tensors
        assert forms_of("made") == forms_of("whole")
        resumed, whole = layers_of("made"), layers_of("whole")
        assert resumed.keys() == whole.keys()
        for layer, (bits, error) in resumed.items():
            assert (bits, pytest.approx(error, rel=0.25)) == whole[layer], layer
    assert not earlier.partial.exists()


def forms_of(folder: str) -> dict[str, tuple[torch.dtype, torch.Size]]:
    tensors = load_file(Path(folder) / "model.safetensors")
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def layers_of(folder: str) -> dict[str, tuple[float, float]]:
    """Of the report: for each quantized layer its bits, and the relative error of its output."""
    layers = json.loads((Path(folder) / "quantize_report.json").read_text())["layers"]
    return {layer["name"]: (layer["bits"], layer["output_error"]) for layer in layers}


def test_a_run_with_other_libraries_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    earlier = CutShort("rtn")
    earlier.change({"torch": "2.0.0"})
    before = {path: path.read_bytes() for path in earlier.partial.rglob("*") if path.is_file()}
    with pytest.raises(Refused, match=r"cut short after 2 steps.*--resume.*--restart") as caught:
        earlier.quantize()
    assert caught.value.args[0] == 2
    with pytest.raises(Refused, match=r"torch: 2\.0\.0 then, .* now.*--restart") as caught:
        earlier.quantize("--resume")
    assert caught.value.args[0] == 2
    after = {path: path.read_bytes() for path in before}
    assert after == before
    earlier.quantize("--restart")
    assert digests_of("made") == earlier.tensors
