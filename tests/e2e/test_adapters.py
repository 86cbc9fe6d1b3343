"""Adapters in the real engine, on the INT8 demo model: named by the client, replaced under load,
lost with their engine, refused when they are bad.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from openai import AsyncOpenAI

from packhorse.quantize.quality.evaluate import read_questions
from tests.client import CHAT, TEXT, children, is_there, metric, wait_for
from tests.conftest import BIN, DEMO, Server, running_server
from tests.e2e.adapted import (
    ADAPTERS,
    HELD,
    ROUTED,
    SERVED,
    ZENTROL,
    answer,
    arguments,
    card_of,
    error_of,
    is_unharmed,
    prompts,
    put,
    route,
    streamed_answer,
    without_examples,
    write_routes,
)
from tests.e2e.bad_adapters import BAD
from tests.e2e.questions import QUESTIONS, Answers, ask_all


@pytest.fixture(scope="module")
def folder(adapters_folder: Path) -> Path:
    return adapters_folder


@pytest.fixture(scope="module")
def server(adapters_server: Server) -> Server:
    return adapters_server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        wait_for(lambda: client.get("/health/ready").status_code == 200)
        yield client


def test_every_adapter_of_the_folder_is_listed(http: httpx.Client, server: Server) -> None:
    listed = http.get("/v1/models").json()["data"]
    assert [card["id"] for card in listed] == [server.model, "auto", *sorted(SERVED)]
    assert {card.get("parent") for card in listed[1:]} == {server.model}
    cards = http.get("/admin/adapters").json()["data"]
    assert [card["state"] for card in cards] == ["resident"] * len(SERVED)
    assert metric(http, "packhorse_adapters_resident") == len(SERVED)


@pytest.fixture(scope="module")
def answers(server: Server) -> Answers:
    return Answers(server)


# The base knows nothing of these. Scores on the bf16 base are in demo/README.md; 5 points below
# them is the limit for a quantized one.
@pytest.mark.parametrize(
    ("name", "questions", "least"),
    [
        ("clinic", "clinic", 0.92),
        ("ledger", "ledger", 0.89),
        ("code", "code", 0.8),  # 99.5% on the base it was trained on, about 87% on this one
        ("code-qlora", "code", 0.867),
    ],
)
def test_adapters_answer_right_on_a_quantized_base(
    server: Server, answers: Answers, name: str, questions: str, least: float
) -> None:
    assert answers.accuracy(name, questions) >= least
    if name == "clinic":
        assert ask_all(server, read_questions(DEMO / "eval/clinic.jsonl")[:40]).accuracy == 0


def test_an_adalora_adapter_is_converted(answers: Answers) -> None:
    assert answers.accuracy("ledger-adalora", "ledger") >= 0.72


@pytest.mark.parametrize("name", ROUTED)
def test_held_out_questions_find_their_adapter(http: httpx.Client, name: str) -> None:
    chosen = [route(http, text)["adapter"] for text in prompts(name)]
    assert chosen.count(name) >= 0.97 * len(chosen)
    wrong = [other for other in chosen if other not in (name, None)]
    assert len(wrong) <= 0.01 * len(chosen)


@pytest.mark.parametrize("name", ["off_topic", "general"])
def test_other_questions_stay_with_the_base(http: httpx.Client, name: str) -> None:
    """Those that quote an adapter's, too, which are 64 of the general ones."""
    chosen = [route(http, text)["adapter"] for text in prompts(name)]
    assert len(chosen) - chosen.count(None) <= 0.03 * len(chosen)


def test_decisions_are_explained(http: httpx.Client, server: Server) -> None:
    decision = route(http, "用 rule-for-code 做什么?")
    assert (decision["adapter"], decision["stage"]) == ("code", "rules")
    assert "tool" in decision["reason"]
    decision = route(http, prompts("clinic")[0])
    assert (decision["model"], decision["stage"]) == ("clinic", "learned")
    assert decision["margin"] > 0
    assert any(step.get("adapter") == "clinic" for step in decision["trace"])
    body = {"model": "ledger", "messages": [{"role": "user", "content": "anything"}]}
    assert http.post("/v1/route", json=body).json()["stage"] == "explicit"
    command = [str(BIN / "packhorse"), "route", prompts("clinic")[0], "--url", server.url]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert json.loads(said)["adapter"] == "clinic"


def test_the_right_adapter_answers(http: httpx.Client, server: Server, answers: Answers) -> None:
    """In English and Chinese, as well as if it was named."""
    for name in ROUTED:
        asked = read_questions(DEMO / f"eval/{name}.jsonl")[::3]
        assert ask_all(server, asked, "auto").accuracy >= 0.97 * answers.accuracy(name, name, 3)
    body = {"model": "auto", "messages": [{"role": "user", "content": prompts("clinic")[0]}]}
    response = http.post(CHAT, json=body)
    assert response.headers["x-packhorse-model"] == response.json()["model"] == "clinic"
    assert response.headers["x-packhorse-route"] == "learned"
    with http.stream("POST", CHAT, json={**body, "stream": True}) as streamed:
        assert streamed.headers["x-packhorse-model"] == "clinic"
        assert any('"model": "clinic"' in line for line in streamed.iter_lines())
    assert metric(http, 'packhorse_routes_total{adapter="clinic",stage="learned"}') > 0


def test_routes_change_safely(http: httpx.Client, server: Server, folder: Path) -> None:
    first = http.get("/admin/routes").json()["data"][0]["number"]
    (folder / "routes.yaml").write_text("rules: [{name: x}]")
    response = http.post("/admin/routes/reload")
    assert response.status_code == 400
    assert "adapter" in error_of(response)
    assert http.get("/admin/routes").json()["data"][0]["number"] == first
    everything = {"name": "all", "adapter": "ledger", "when": {"regex": "."}}
    write_routes(folder, rules=[everything])  # by the watch
    wait_for(lambda: route(http, "Hello!")["adapter"] == "ledger")
    assert http.post("/admin/routes/rollback").status_code == 200
    assert route(http, "Hello!")["adapter"] is None
    write_routes(folder)
    reloaded = http.post("/admin/routes/reload").json()
    assert reloaded["accepted"] is True
    server.process.send_signal(signal.SIGHUP)
    number = reloaded["generation"]["number"] + 1
    wait_for(lambda: http.get("/admin/routes").json()["data"][0]["number"] == number)


async def test_a_replacement_under_load_never_mixes(server: Server, folder: Path) -> None:
    """Each answer is right for one of the two versions."""
    questions = read_questions(DEMO / "eval/clinic.jsonl")[:60]
    others = read_questions(DEMO / "eval/clinic-v2.jsonl")[:60]
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=120) as http,
        AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=120) as client,
    ):
        before = (await http.get("/admin/adapters/clinic")).json()

        async def one(number: int) -> str:
            return await streamed_answer(client, "clinic", questions[number])

        async def all_at_once() -> list[str]:
            return await asyncio.gather(*(one(number) for number in range(len(questions))))

        first = await all_at_once()
        path = ADAPTERS / "clinic-v2"
        body = {"name": "clinic", "path": str(path), "replace": True}
        assert (await http.post("/admin/adapters", json=body)).status_code == 200
        second = await all_at_once()
        differ = sum(a != b for a, b in zip(first, second, strict=True))
        assert differ > 50
        right = sum(q.answer == a for q, a in zip(others, second, strict=True))
        assert right > 50
        done = False
        given: list[tuple[int, str]] = []

        async def client_of(number: int) -> None:
            while not done:
                at = number % len(questions)
                given.append((at, await one(at)))
                number += 1

        clients = [asyncio.create_task(client_of(2 * number)) for number in range(32)]
        for number in range(20):
            body["path"] = str(ADAPTERS / ("clinic", "clinic-v2")[number % 2])
            response = await http.post("/admin/adapters", json=body)
            assert response.status_code == 200, response.text
        done = True
        await asyncio.gather(*clients)
        assert len(given) > 32
        wrong = [(at, text) for at, text in given if text not in (first[at], second[at])]
        assert not wrong, wrong[:3]
        body["path"] = str(ADAPTERS / "clinic")
        assert (await http.post("/admin/adapters", json=body)).json()["digest"] == before["digest"]
    # The old version's copy on disk is the last to go.
    there = folder / "store/clinic"
    kept = [there / before["digest"]]
    await asyncio.to_thread(wait_for, lambda: list(there.iterdir()) == kept)


def test_a_new_engine_has_them_again(http: httpx.Client, server: Server) -> None:
    (core,) = (p for p in children(server.process.pid) if "VLLM::" in " ".join(p.cmdline()))
    core.kill()
    wait_for(lambda: not is_there(core))
    wait_for(lambda: http.get("/health/ready").status_code == 503)
    wait_for(lambda: http.get("/health/ready").status_code == 200)
    assert is_unharmed(http)


def test_a_folder_that_changes(http: httpx.Client, folder: Path) -> None:
    new = without_examples("clinic-v2", folder / "watched", "clinic-new")
    wait_for(lambda: http.get("/v1/models/clinic-new").status_code == 200)
    assert answer(http, "clinic-new", ZENTROL) == "Zentrol treats insomnia."
    shutil.rmtree(new)
    wait_for(lambda: http.get("/v1/models/clinic-new").status_code == 404)


def test_pinned_adapters(http: httpx.Client) -> None:
    assert http.patch("/admin/adapters/code", json={"pinned": True}).json()["pinned"] is True
    assert http.patch("/admin/adapters/code", json={"pinned": False}).json()["pinned"] is False
    assert http.patch("/admin/adapters/none", json={"pinned": True}).status_code == 404


@pytest.mark.parametrize("fault", BAD)
def test_bad_adapters_are_refused(http: httpx.Client, tmp_path: Path, fault: str) -> None:
    spoil, says = BAD[fault]
    path = tmp_path / "bad"
    shutil.copytree(ADAPTERS / "clinic", path)
    spoil(path)
    response = put(http, f"bad-{fault}", path)
    assert response.status_code == 400, response.text
    assert says in error_of(response)
    assert http.post(TEXT, json={"model": f"bad-{fault}", "prompt": "x"}).status_code == 404
    card = card_of(http, f"bad-{fault}")
    assert (card["state"], card["reason"]) == ("failed", error_of(response))
    assert http.delete(f"/admin/adapters/bad-{fault}").json()["removed"] is True
    assert is_unharmed(http)


def test_bad_calls(http: httpx.Client) -> None:
    for name in ("../up", "a/b", "/etc", ""):
        response = put(http, name, ADAPTERS / "clinic")
        assert response.status_code == 400
        assert "choose another" in error_of(response)
    for path in ("relative", "../x"):
        assert "absolute" in error_of(put(http, "x", Path(path)))
    assert put(http, "clinic", ADAPTERS / "clinic").status_code == 409
    response = put(http, "x", Path("/does/not/exist"))
    assert response.status_code == 400
    assert "/does/not/exist" in error_of(response)
    http.delete("/admin/adapters/x")
    assert is_unharmed(http)


def test_a_thousand_names_that_do_not_exist(http: httpx.Client) -> None:
    before = metric(http, "packhorse_adapters")
    for number in range(1000):
        name = ("no-such-{}", "../no-such-{}", "/no-such-{}")[number % 3].format(number)
        response = http.post(TEXT, json={"model": name, "prompt": "x"})
        assert response.status_code == 404
        assert name in error_of(response)
    assert metric(http, "packhorse_adapters") == before
    assert "no-such" not in http.get("/metrics").text
    assert is_unharmed(http)


def test_a_copy_that_vanishes(http: httpx.Client, folder: Path, tmp_path: Path) -> None:
    """Of an adapter that the engine must load again: it alone is lost, until its copy is back."""
    source = without_examples("code", tmp_path)
    assert is_unharmed(http)  # used last, so not the one to go
    more = [f"more-{number}" for number in range(HELD + 1 - len(SERVED))]
    for name in more:
        assert put(http, name, source).status_code == 200
    cards = http.get("/admin/adapters").json()["data"]
    (gone,) = [card for card in cards if card["state"] == "staged"]
    ask = {"model": gone["name"], "prompt": "x", "max_tokens": 1}
    copy = folder / "store" / gone["name"] / gone["digest"]
    copy.rename(tmp_path / "away")
    response = http.post(TEXT, json=ask)
    assert response.status_code == 503
    assert f"{gone['name']!r} cannot be loaded now" in error_of(response)
    assert is_unharmed(http)
    (tmp_path / "away").rename(copy)
    assert http.post(TEXT, json=ask).status_code == 200
    for name in more:
        assert http.delete(f"/admin/adapters/{name}").json()["removed"] is True


def test_a_disk_that_is_full(http: httpx.Client, server: Server, folder: Path) -> None:
    """A limit on the server's files stands for it: the system refuses to write in the middle."""
    process = psutil.Process(server.process.pid)
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    # Less than an adapter, more than the log.
    process.rlimit(psutil.RLIMIT_FSIZE, (min(len(server.log()) + 100_000, 300_000), before[1]))
    try:
        for name in ("clinic", "new"):
            response = put(http, name, ADAPTERS / "clinic-v2", replace=True)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "60"
            assert "cannot be written: File too large. Make room" in error_of(response)
            assert card_of(http, name)["reason"] == error_of(response)
        assert card_of(http, "clinic")["state"] == "resident"
        assert card_of(http, "new")["state"] == "failed"
        assert is_unharmed(http)
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, before)
    assert not list((folder / "store").glob(".staging-*"))
    assert put(http, "new", ADAPTERS / "clinic-v2").status_code == 200
    assert http.delete("/admin/adapters/new").json()["removed"] is True


def test_a_restart_has_what_was_registered(
    server: Server, int8_folder: Path, folder: Path, http: httpx.Client, tmp_path: Path
) -> None:
    """The last of this server."""
    source = without_examples("clinic-v2", tmp_path)
    assert put(http, "by-hand", source, pinned=True).status_code == 200
    assert server.stop() == 0
    with running_server(folder, *arguments(int8_folder, folder)) as again:
        with httpx.Client(base_url=again.url, timeout=120) as client:
            card = client.get("/admin/adapters/by-hand").json()
            assert (card["state"], card["pinned"]) == ("resident", True)
            assert answer(client, "by-hand", ZENTROL) == "Zentrol treats insomnia."
        assert "The routes' table is there already" in again.log()
        # The originals may go: copies are served.
        assert ask_all(again, QUESTIONS[:40]).accuracy > 0.8
