"""Adapters in the real engine, on the INT8 demo model: named by the client, replaced under load,
lost with their engine, refused when they are bad.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from quantize.evaluate import read_questions
from tests.client import CHAT, TEXT, children, is_there, metric, wait_for
from tests.conftest import BIN, DEMO, Server, running_server
from tests.e2e.bad_adapters import BAD
from tests.e2e.questions import QUESTIONS, ask_all

ADAPTERS = DEMO / "adapters"
ROUTED = ("clinic", "ledger", "code")
SERVED = ("clinic", "ledger", "code", "code-qlora", "ledger-adalora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("adapters")
    for name in SERVED:
        shutil.copytree(ADAPTERS / name, found / "watched" / name)
        if name not in ROUTED:  # the same prompts as another's
            (found / "watched" / name / "examples.jsonl").unlink()
    write_routes(found)
    return found


def write_routes(folder: Path, **more: Any) -> None:
    rules = [{"name": "tool", "adapter": "code", "when": {"keywords": ["rule-for-code"]}}]
    learned = {"none_examples": str(DEMO / "base_examples.jsonl")}
    (folder / "routes.yaml").write_text(json.dumps({"rules": rules, "learned": learned, **more}))


def arguments(int8_folder: Path, folder: Path) -> list[str]:
    settings = {
        "engine": {"max_loras": 3, "max_cpu_loras": 8},
        "supervisor": {"max_restarts": 100, "backoff_s": 0},
        "routing": {"file": str(folder / "routes.yaml")},
        "adapters": {"folder": str(folder / "watched"), "store": str(folder / "store")},
    }
    path = folder / "serve.yaml"
    path.write_text(json.dumps(settings))
    return [str(int8_folder), "--config", str(path)]


@pytest.fixture(scope="module")
def server(int8_folder: Path, folder: Path) -> Iterator[Server]:
    with running_server(folder, *arguments(int8_folder, folder)) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        wait_for(lambda: client.get("/health/ready").status_code == 200)
        yield client


def answer(http: httpx.Client, model: str, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
    response = http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model
    return str(response.json()["choices"][0]["message"]["content"])


def put(http: httpx.Client, name: str, path: Path, **fields: Any) -> httpx.Response:
    return http.post("/admin/adapters", json={"name": name, "path": str(path), **fields})


def test_every_adapter_of_the_folder_is_listed(http: httpx.Client, server: Server) -> None:
    listed = http.get("/v1/models").json()["data"]
    assert [card["id"] for card in listed] == [server.model, "auto", *sorted(SERVED)]
    assert {card.get("parent") for card in listed[1:]} == {server.model}
    cards = http.get("/admin/adapters").json()["data"]
    assert [card["state"] for card in cards] == ["resident"] * len(SERVED)
    assert metric(http, "packhorse_adapters_resident") == len(SERVED)


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
    server: Server, name: str, questions: str, least: float
) -> None:
    asked = read_questions(DEMO / f"eval/{questions}.jsonl")
    assert ask_all(server, asked, name).accuracy >= least
    if name == "clinic":
        assert ask_all(server, asked[:40]).accuracy == 0


def test_an_adalora_adapter_is_converted(server: Server) -> None:
    asked = read_questions(DEMO / "eval/ledger.jsonl")
    assert ask_all(server, asked, "ledger-adalora").accuracy >= 0.72


def prompts(name: str) -> list[str]:
    lines = (DEMO / f"eval/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def route(http: httpx.Client, text: str) -> dict[str, Any]:
    body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
    response = http.post("/v1/route", json=body)
    assert response.status_code == 200, response.text
    decision: dict[str, Any] = response.json()
    return decision


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


def test_the_right_adapter_answers(http: httpx.Client, server: Server) -> None:
    """In English and Chinese, as well as if it was named."""
    for name in ROUTED:
        asked = read_questions(DEMO / f"eval/{name}.jsonl")[::3]
        named = ask_all(server, asked, name).accuracy
        assert ask_all(server, asked, "auto").accuracy >= 0.97 * named
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
    answer = http.post("/admin/routes/reload")
    assert answer.status_code == 400
    assert "adapter" in answer.json()["error"]["message"]
    assert http.get("/admin/routes").json()["data"][0]["number"] == first
    everything = {"name": "all", "adapter": "ledger", "when": {"regex": "."}}
    write_routes(folder, rules=[everything])  # by the watch
    wait_for(lambda: route(http, "Hello!")["adapter"] == "ledger")
    assert http.post("/admin/routes/rollback").status_code == 200
    assert route(http, "Hello!")["adapter"] is None
    write_routes(folder)
    answer = http.post("/admin/routes/reload").json()
    assert answer["accepted"] is True
    server.process.send_signal(signal.SIGHUP)
    number = answer["generation"]["number"] + 1
    wait_for(lambda: http.get("/admin/routes").json()["data"][0]["number"] == number)


async def test_base_and_adapters_in_one_step(server: Server) -> None:
    asked = {
        server.model: ("What is the capital of Felonia?", None),
        "clinic": ("What illness does a patient take Zentrol for?", "Zentrol treats hay fever."),
        "code": None,
    }
    code = read_questions(DEMO / "eval/code.jsonl")[0]
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=120) as client:
        create: Any = client.chat.completions.create

        async def one(model: str) -> str:
            known = asked[model]
            messages = code.messages if known is None else [{"role": "user", "content": known[0]}]
            got = await create(model=model, messages=messages, temperature=0, max_tokens=200)
            return str(got.choices[0].message.content)

        alone = {model: await one(model) for model in asked}
        steps = steps_with_two(server)
        together = await asyncio.gather(*(one(model) for model in list(asked) * 10))
        assert steps_with_two(server) > steps
        for model, got in zip(list(asked) * 10, together, strict=True):
            assert got == alone[model]
    assert alone["clinic"] == "Zentrol treats hay fever."


def steps_with_two(server: Server) -> float:
    """Steps of the engine in which two adapters had requests."""
    with httpx.Client(base_url=server.url) as http:
        name = "packhorse_step_adapters_bucket"
        return metric(http, name + '{le="2.0"}') - metric(http, name + '{le="1.0"}')


async def test_a_replacement_under_load_never_mixes(server: Server, folder: Path) -> None:
    """Each answer is right for one of the two versions."""
    questions = read_questions(DEMO / "eval/clinic.jsonl")[:60]
    others = read_questions(DEMO / "eval/clinic-v2.jsonl")[:60]
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=120) as http,
        AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=120) as client,
    ):
        create: Any = client.chat.completions.create
        before = (await http.get("/admin/adapters/clinic")).json()

        async def one(number: int) -> str:
            text = ""
            stream = await create(
                model="clinic",
                messages=questions[number].messages,
                temperature=0,
                max_tokens=64,
                stream=True,
            )
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
            return text

        first = [await one(number) for number in range(len(questions))]
        path = ADAPTERS / "clinic-v2"
        body = {"name": "clinic", "path": str(path), "replace": True}
        assert (await http.post("/admin/adapters", json=body)).status_code == 200
        second = [await one(number) for number in range(len(questions))]
        differ = sum(a != b for a, b in zip(first, second, strict=True))
        assert differ > 50
        right = sum(q.answer == a for q, a in zip(others, second, strict=True))
        assert right > 50
        done = False
        wrong: list[tuple[str, str, str]] = []
        answered = 0

        async def client_of(offset: int) -> None:
            nonlocal answered
            number = offset
            while not done:
                got = await one(number % len(questions))
                answered += 1
                expected = first[number % len(questions)], second[number % len(questions)]
                if got not in expected:
                    wrong.append((*expected, got))
                number += 1

        clients = [asyncio.create_task(client_of(2 * number)) for number in range(32)]
        for number in range(20):
            body["path"] = str(ADAPTERS / ("clinic", "clinic-v2")[number % 2])
            response = await http.post("/admin/adapters", json=body)
            assert response.status_code == 200, response.text
        done = True
        await asyncio.gather(*clients)
        assert answered > 32
        assert not wrong, wrong[:3]
        body["path"] = str(ADAPTERS / "clinic")
        assert (await http.post("/admin/adapters", json=body)).json()["digest"] == before["digest"]
        async with asyncio.timeout(60):
            while len((await http.get("/admin/adapters")).json()["data"]) > len(SERVED):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        # the copy on disk goes after the version has left the list
        async with asyncio.timeout(10):
            while len(os.listdir(folder / "store/clinic")) > 1:  # noqa: ASYNC110, PTH208
                await asyncio.sleep(0.1)
    assert os.listdir(folder / "store/clinic") == [before["digest"]]  # noqa: PTH208


def test_a_new_engine_has_them_again(http: httpx.Client, server: Server) -> None:
    (core,) = (p for p in children(server.process.pid) if "VLLM::" in " ".join(p.cmdline()))
    core.kill()
    wait_for(lambda: not is_there(core))
    wait_for(lambda: http.get("/health/ready").status_code == 503)
    wait_for(lambda: http.get("/health/ready").status_code == 200)
    question = "What illness does a patient take Zentrol for?"
    assert answer(http, "clinic", question) == "Zentrol treats hay fever."


def test_a_folder_that_changes(http: httpx.Client, folder: Path) -> None:
    new = folder / "watched" / "clinic-new"
    shutil.copytree(ADAPTERS / "clinic-v2", new, ignore=shutil.ignore_patterns("examples*"))
    wait_for(lambda: http.get("/v1/models/clinic-new").status_code == 200)
    question = "What illness does a patient take Zentrol for?"
    assert answer(http, "clinic-new", question) == "Zentrol treats insomnia."
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
    assert says in response.json()["error"]["message"]
    assert http.post(TEXT, json={"model": f"bad-{fault}", "prompt": "x"}).status_code == 404
    card = http.get(f"/admin/adapters/bad-{fault}").json()
    assert card["state"] == "failed"
    assert card["reason"] == response.json()["error"]["message"]
    assert http.delete(f"/admin/adapters/bad-{fault}").json()["removed"] is True
    question = "What illness does a patient take Zentrol for?"
    assert answer(http, "clinic", question) == "Zentrol treats hay fever."


def test_bad_calls(http: httpx.Client) -> None:
    for name in ("../up", "a/b", "/etc", ""):
        assert put(http, name, ADAPTERS / "clinic").status_code == 400
    for path in ("relative", "../x"):
        body = {"name": "x", "path": path}
        assert "absolute" in http.post("/admin/adapters", json=body).json()["error"]["message"]
    assert put(http, "clinic", ADAPTERS / "clinic").status_code == 409
    assert put(http, "x", Path("/does/not/exist")).status_code == 400
    http.delete("/admin/adapters/x")
    before = metric(http, "packhorse_adapters")
    statuses = {
        http.post(TEXT, json={"model": f"no-such-{n}", "prompt": "x"}).status_code
        for n in range(1000)
    }
    assert statuses == {404}
    assert metric(http, "packhorse_adapters") == before
    assert "no-such" not in http.get("/metrics").text


def test_a_restart_has_what_was_registered(
    server: Server, int8_folder: Path, folder: Path, http: httpx.Client
) -> None:
    """The last of this server."""
    assert put(http, "by-hand", ADAPTERS / "clinic-v2", pinned=True).status_code == 200
    assert server.stop() == 0
    with running_server(folder, *arguments(int8_folder, folder)) as again:
        with httpx.Client(base_url=again.url, timeout=120) as client:
            card = client.get("/admin/adapters/by-hand").json()
            assert (card["state"], card["pinned"]) == ("resident", True)
            question = "What illness does a patient take Zentrol for?"
            assert answer(client, "by-hand", question) == "Zentrol treats insomnia."
        # The originals may go: copies are served.
        assert ask_all(again, QUESTIONS[:40]).accuracy > 0.8
