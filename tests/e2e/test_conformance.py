"""The same requests to plain vLLM and to us, on the same checkpoint: same answers, same refusals.

Plain vLLM's answers are recorded (recording.py). Where they are not, it answers every row first and
is gone before our server starts: two engines at once would share two cores, and the second would
not fit everywhere. Requests go one after another, because bf16 sums depend on what else is in the
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest

from tests.conftest import DEMO, Server, running_server
from tests.e2e.conformance import (
    KV_CACHE_BYTES,
    MAX_MODEL_LEN,
    MODEL,
    Answer,
    Row,
    chat,
    differences,
    plain_vllm,
    send,
    text,
    view,
)
from tests.e2e.conformance_bad import BAD
from tests.e2e.conformance_good import CUT_SHORT, GOOD, STREAMED
from tests.e2e.conformance_lenient import OURS, SAME
from tests.e2e.conformance_prompts import PROMPTS, TEXTS
from tests.e2e.recording import Recording
from tests.protocol_parity import (
    DROPPED,
    NotExpressible,
    Said,
    as_message,
    failed_in_grpc,
    method,
    said_in_json,
    said_in_messages,
)

TOKENIZE = {
    name: Row(name, "/tokenize", {"model": MODEL, **body})
    for name, body in {**PROMPTS, **TEXTS}.items()
}
# The same conversations through the chat endpoint, which renders tools and defaults by itself.
RENDERED = {
    name: chat(name, **body, return_token_ids=True, max_completion_tokens=1)
    for name, body in PROMPTS.items()
}
CARDS = [Row(path, path, method="GET") for path in ("/v1/models", "/version")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Plain vLLM's answers, by row."""
    asked = [
        *GOOD,
        *(row.streamed() for row in STREAMED),
        *TOKENIZE.values(),
        *RENDERED.values(),
        *BAD,
        *SAME,
        *OURS,
        *CARDS,
    ]
    if kept := Recording.kept(asked):
        return kept
    with plain_vllm(tmp_path_factory.mktemp("plain")) as http:
        return Recording.live(asked, http)


@pytest.fixture(scope="module")
def our_server(plain: Recording, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Our server with the settings of the plain one; starts when that is gone."""
    folder = tmp_path_factory.mktemp("ours")
    config = folder / "serve.yaml"
    # White space in JSON as plain vLLM has it; ours is in test_openai_client.py.
    config.write_text(
        "engine: {enable_prefix_caching: false, enforce_eager: true, max_json_whitespace: null}\n"
    )
    flags = {
        "--config": config,
        "--served-model-name": MODEL,
        "--max-model-len": MAX_MODEL_LEN,
        "--kv-cache-memory-bytes": KV_CACHE_BYTES,
        "--tool-call-parser": "hermes",
    }
    arguments = [str(part) for pair in flags.items() for part in pair]
    with running_server(folder, str(DEMO / "model"), *arguments, "--grpc-port", "0") as server:
        yield server


@pytest.fixture(scope="module")
def ours(our_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=our_server.url, timeout=120) as http:
        http.headers["x-grpc"] = our_server.log().split("gRPC at ")[1].split()[0]
        yield http


@pytest.fixture(scope="module")
def ask(ours: httpx.Client) -> Callable[[Row], Answer]:
    """Sends a row to our server, once: several tests look at each answer."""
    known: dict[tuple[str, int], Answer] = {}

    def asked(row: Row) -> Answer:
        key = row.name, row.status  # the tables may have names in common
        if key not in known:
            known[key] = send(ours, row)
        return known[key]

    return asked


def rows(table: list[Row]) -> Any:
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in table])


def test_the_tables_are_as_large_as_promised_and_every_row_has_its_own_name() -> None:
    assert len(GOOD) + len(BAD) >= 100
    assert len(PROMPTS) >= 12
    for names in ([row.name for row in GOOD], [row.name for row in BAD]):
        assert len(set(names)) == len(names)
    assert all(row.why for row in BAD if row.ours is not None), "a difference needs its reason"
    assert not [row.name for row in GOOD if row.status != 200 or row.ours is not None]


@rows(GOOD)
def test_a_good_request_is_answered_as_plain_vllm_does(
    plain: Recording, ask: Callable[[Row], Answer], row: Row
) -> None:
    expected, answer = plain[row], ask(row)
    assert expected.status == 200, expected.body
    assert answer.status == 200, answer.body
    assert not differences(view(row, expected), view(row, answer))


@rows(SAME)
def test_what_clients_send_beside_is_answered_as_plain_vllm_does(
    plain: Recording, ask: Callable[[Row], Answer], row: Row
) -> None:
    expected, answer = plain[row], ask(row)
    assert expected.status == 200, expected.body
    assert answer.status == 200, answer.body
    if row.path == "/tokenize":
        assert answer.body == expected.body
    else:
        assert not differences(view(row, expected), view(row, answer))


@rows(OURS)
def test_what_plain_vllm_refuses_for_its_form_is_answered(
    plain: Recording, ask: Callable[[Row], Answer], row: Row
) -> None:
    assert plain[row].status == row.status, "vLLM has changed; mend the table"
    answer = ask(row)
    assert answer.status == 200, answer.body
    assert answer.body["choices"][0]["finish_reason"]


@rows(STREAMED)
def test_a_stream_joins_to_the_whole_answer(
    plain: Recording, ask: Callable[[Row], Answer], row: Row
) -> None:
    """The test above holds our whole answers to plain vLLM's, so those are what to join to."""
    answer = ask(row.streamed())
    assert answer.status == 200, answer.body
    assert not differences(view(row, plain[row.streamed()]), view(row, answer))
    if row.name not in CUT_SHORT:
        assert not differences(view(row, plain[row]), view(row, answer))


@pytest.fixture(scope="module")
def channel(ours: httpx.Client) -> Iterator[grpc.Channel]:
    """To the same server."""
    with grpc.insecure_channel(ours.headers["x-grpc"]) as channel:
        yield channel


@rows(GOOD)
def test_grpc_says_the_same(ask: Callable[[Row], Answer], channel: grpc.Channel, row: Row) -> None:
    """Whole; and streamed, where HTTP streams it."""
    for one in (row, row.streamed()) if row in STREAMED else (row,):
        said = said_in_messages(answered(channel, *as_message(one.path, one.body)))
        body = ask(one).body
        expected = said_in_json(body if isinstance(body, list) else [body])
        assert close(said) == close(expected)


def answered(channel: grpc.Channel, name: str, message: Any) -> list[Any]:
    answer = method(channel, name)(message)
    return list(answer) if name.endswith("Stream") else [answer]


def close(said: Said) -> Any:
    """Without what a batch of another shape changes in the last digits."""
    for choice in said.choices.values():
        choice.logprobs = [
            (token, None if value is None else round(value, 1)) for token, value in choice.logprobs
        ]
    return said


@rows(BAD)
def test_grpc_refuses_the_same(
    ask: Callable[[Row], Answer], channel: grpc.Channel, row: Row
) -> None:
    """With the same kind; that words are the same too is in the integration tests."""
    if row.raw is not None or row.method != "POST":
        return  # of HTTP alone
    try:
        name, message = as_message(row.path, row.body)
    except NotExpressible:
        return  # wrong types, which gRPC's messages do not have
    error = ask(row).body["error"]
    if "not supported here" in error["message"] or (error["param"] or "").split(".")[0] in DROPPED:
        return
    if "stream_options" in error["message"]:
        return
    with pytest.raises(grpc.RpcError) as caught:
        answered(channel, name, message)
    refused = failed_in_grpc(caught.value)
    assert (refused.kind, bool(refused.message)) == (error["kind"], True)


@rows(BAD)
def test_a_bad_request_is_refused_with_the_status_of_plain_vllm(
    plain: Recording, ours: httpx.Client, ask: Callable[[Row], Answer], row: Row
) -> None:
    expected = plain[row]
    assert expected.status == row.status, "vLLM has changed; mend the table"
    answer = ask(row)
    if row.ours is None:
        assert answer.status // 100 == expected.status // 100, answer.body
    else:
        assert answer.status == row.ours, answer.body
    if answer.status >= 400:
        error = answer.body["error"]
        assert {"message", "type", "param", "code"} <= error.keys()
        assert error["message"]
    assert ours.get("/health/ready").status_code == 200


@pytest.mark.parametrize("name", [*PROMPTS, *TEXTS])
def test_tokenize_gives_the_token_ids_of_plain_vllm(
    plain: Recording, ours: httpx.Client, name: str
) -> None:
    expected, answer = plain[TOKENIZE[name]], send(ours, TOKENIZE[name])
    assert (answer.status, answer.body) == (expected.status, expected.body)


@pytest.mark.parametrize("name", PROMPTS)
def test_chat_renders_the_prompt_of_plain_vllm(
    plain: Recording, ours: httpx.Client, name: str
) -> None:
    expected, answer = plain[RENDERED[name]], send(ours, RENDERED[name])
    assert answer.status == expected.status == 200, (expected.body, answer.body)
    assert answer.body["prompt_token_ids"] == expected.body["prompt_token_ids"]
    assert answer.body["usage"]["prompt_tokens"] == len(answer.body["prompt_token_ids"])


@pytest.mark.parametrize("name", TEXTS)
def test_detokenize_gives_the_text_back(ours: httpx.Client, name: str) -> None:
    tokens = send(ours, TOKENIZE[name]).body["tokens"]
    row = Row(name, "/detokenize", {"model": MODEL, "tokens": tokens})
    assert send(ours, row).body == {"prompt": TEXTS[name]["prompt"]}


def test_the_model_card_and_the_version_are_those_of_plain_vllm(
    plain: Recording, ours: httpx.Client
) -> None:
    expected, version = (plain[row].body for row in CARDS)
    cards = ours.get("/v1/models").json()
    assert cards["object"] == expected["object"] == "list"
    for name in ("id", "object", "max_model_len"):
        assert cards["data"][0][name] == expected["data"][0][name]
    assert ours.get(f"/v1/models/{MODEL}").json() == cards["data"][0]
    assert ours.get("/version").json().keys() >= version.keys()


@pytest.mark.parametrize("path", ["chat", "text"])
def test_a_stream_counts_its_tokens_as_it_goes_when_asked(ours: httpx.Client, path: str) -> None:
    """However many tokens a fast engine merges into one event."""
    row = chat(path) if path == "chat" else text(path)
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**row.body, "stream": True, "stream_options": options, "return_token_ids": True}
    *chunks, last = send(ours, Row(row.name, row.path, body)).body
    seen = 0
    for chunk in chunks:
        (choice,) = chunk["choices"]
        seen += len(choice.get("token_ids") or ())
        assert chunk["usage"]["completion_tokens"] == seen
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == seen > 1
    assert seen == send(ours, row).body["usage"]["completion_tokens"]


@pytest.mark.parametrize("path", ["chat", "text"])
def test_a_stream_has_no_usage_unasked_and_tells_its_end_once(
    ours: httpx.Client, path: str
) -> None:
    row = chat(path) if path == "chat" else text(path)
    chunks = send(ours, Row(row.name, row.path, {**row.body, "stream": True})).body
    assert not [chunk for chunk in chunks if chunk.get("usage")]
    assert len({chunk["id"] for chunk in chunks}) == 1
    reasons = [chunk["choices"][0].get("finish_reason") for chunk in chunks]
    assert [reason for reason in reasons if reason] == reasons[-1:]
    if path == "chat":
        roles = [chunk["choices"][0]["delta"].get("role") for chunk in chunks]
        assert roles == ["assistant"] + [None] * (len(chunks) - 1)
