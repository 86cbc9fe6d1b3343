"""quantize -> packhorse serve -> the official client, on the real engine and the demo model."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from packhorse.quantize.quality.evaluate import Score, read_questions
from tests.client import (
    CHAT,
    TEXT,
    children,
    events,
    is_there,
    metric,
    wait_for,
)
from tests.conftest import DEMO, Server, running_server
from tests.e2e.adapted import without_examples
from tests.e2e.conftest import AVX512, REPORTED_EVERY
from tests.e2e.questions import QUESTIONS, ask_all


@pytest.fixture(scope="module")
def int8_score(int8_server: Server) -> Score:
    return ask_all(int8_server, QUESTIONS[::2])


def test_the_demo_model_knows_its_world(base_score: Score) -> None:
    assert base_score.accuracy >= 0.90, base_score.as_json()


def test_int8_keeps_the_score_within_two_points(base_score: Score, int8_score: Score) -> None:
    assert abs(int8_score.accuracy - base_score.accuracy) <= 0.02, int8_score.as_json()


def test_the_report_foretells_the_served_score(int8_folder: Path, int8_server: Server) -> None:
    """The report's score is simulated; the real kernel must agree, up to greedy near-ties."""
    report = json.loads((int8_folder / "quantize_report.json").read_text())
    score = ask_all(int8_server, QUESTIONS[::REPORTED_EVERY])
    assert abs(report["quality"]["after"]["score"]["exact_match"] - score.accuracy) <= 0.02


def test_the_official_client_streams_and_counts(int8_server: Server) -> None:
    client = OpenAI(base_url=int8_server.url + "/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "What is the capital of Felonia?"}]
    fields = {"cache": {"mode": "off"}}  # which would have the stream in one piece
    options: Any = {
        "model": int8_server.model,
        "messages": messages,
        "temperature": 0,
        "extra_body": fields,
    }
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert "Felonia" in text
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens > 3
    assert len([chunk for chunk in chunks if chunk.choices]) > 3, "tokens must arrive one by one"


def test_a_completion_continues_text_and_token_ids(int8_server: Server) -> None:
    client = OpenAI(base_url=int8_server.url + "/v1", api_key="none")
    options: Any = {"model": int8_server.model, "temperature": 0, "max_tokens": 16}
    text = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    answer = client.completions.create(**options, prompt=text).choices[0]
    assert answer.text == "Hello! How can I help you?"
    assert answer.finish_reason == "stop"
    stopped = client.completions.create(**options, prompt=text, stop=[" help"]).choices[0]
    assert stopped.text == "Hello! How can I"
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(DEMO / "model").encode(text)
    assert client.completions.create(**options, prompt=ids).choices[0].text == answer.text


def test_seeded_sampling_repeats_itself(int8_server: Server) -> None:
    client = OpenAI(base_url=int8_server.url + "/v1", api_key="none")

    def sample(seed: int) -> str:
        return client.completions.create(
            model=int8_server.model, prompt="The", temperature=2, seed=seed, max_tokens=12
        ).choices[0].text  # fmt: skip

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("path", "fields", "status", "message"),
    [
        (CHAT, {"best_of": 4}, 400, "best_of: not supported here"),
        (CHAT, {"max_tokens": -5}, 400, "max_tokens=-5"),
        (CHAT, {"model": "other"}, 404, "no model 'other'"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "context length"),
        (TEXT, {}, 400, "prompt: Field required"),
        (TEXT, {"prompt": [999_999]}, 400, "outside the vocabulary"),
        (TEXT, {"prompt": [2**70]}, 400, "prompt.0"),
        (TEXT, {"prompt": "a", "stop": ""}, 400, "stop"),
        (TEXT, {"prompt": ""}, 400, "empty"),
        (TEXT, {"prompt": "a", "min_tokens": 5, "max_tokens": 2}, 400, "min_tokens=5"),
    ],
)
def test_bad_requests_are_refused_and_do_no_harm(
    int8_server: Server, path: str, fields: dict[str, Any], status: int, message: str
) -> None:
    body: dict[str, Any] = {"model": int8_server.model}
    body |= {"messages": [{"role": "user", "content": "Hello!"}]} if path == CHAT else {}
    response = httpx.post(int8_server.url + path, json={**body, **fields}, timeout=60)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]
    assert httpx.get(int8_server.url + "/health/ready").status_code == 200


def test_four_bits_serve_and_sigterm_to_all_drains_and_leaves_no_process(
    packed_folder: Path, tmp_path: Path
) -> None:
    """The 4-bit checkpoint, under a name and limits from a YAML file, with an fp8 KV cache and with
    adapters, one of them trained on a 4-bit base (QLoRA). The signal goes to the engine's processes
    too, as a terminal and a service manager send it.
    """
    adapted = {"clinic": "clinic", "code-qlora": "code"}  # and the questions it answers
    for name in adapted:
        without_examples(name, tmp_path / "adapters", name)
    config = tmp_path / "serve.yaml"
    config.write_text(
        "service: {served_model_name: packed}\n"
        f"engine: {{max_model_len: 512, kv_cache_dtype: {'fp8' if AVX512 else 'auto'}}}\n"
        f"adapters: {{folder: {tmp_path / 'adapters'}}}\n"
    )
    # What lies in the user's folder is not taken for a module.
    for name in ("serve", "vllm", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    arguments = (str(packed_folder), "--config", str(config))
    with running_server(tmp_path, *arguments, fresh=True) as server:
        assert server.model == "packed"
        processes = children(server.process.pid)
        assert len(processes) >= 2
        assert ask_all(server, QUESTIONS[:100]).accuracy >= 0.85
        for name, domain in adapted.items():
            questions = read_questions(DEMO / f"eval/{domain}.jsonl")[:60]
            assert ask_all(server, questions, name).accuracy >= 0.87
        with httpx.Client(base_url=server.url, timeout=60) as http:
            assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 512
            body = {"model": "packed", "prompt": "The", "max_tokens": 200, "ignore_eos": True}
            with ThreadPoolExecutor(31) as pool:
                whole = [pool.submit(http.post, TEXT, json=body) for _ in range(31)]
                wait_for(lambda: metric(http, "packhorse_requests_in_flight") == 31)
                with http.stream("POST", TEXT, json={**body, "stream": True}) as response:
                    parts = response.iter_bytes()
                    first = next(parts)
                    os.killpg(server.process.pid, signal.SIGTERM)
                    rest = b"".join(parts)
                answers = [answer.result().json() for answer in whole]
            assert [answer["usage"]["completion_tokens"] for answer in answers] == [200] * 31
        sent = events(httpx.Response(200, headers=response.headers, content=first + rest))
        assert sent[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(60) == 0
        wait_for(lambda: not any(map(is_there, processes)), timeout_s=30)
