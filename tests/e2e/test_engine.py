"""What a continuous-batching engine promises, observed on the real one: nothing here is timed.

Three servers, one after the other: the demo model with small steps, the 4-bit one with a KV cache
that is too small for its requests, the INT8 one with an 8-bit cache. Answers are exact matches on
the demo's own questions, where the model is sure: bf16 sums depend on the shape of the batch, so
that tokens it is not sure of may differ between a full batch and an empty one.

How many tokens a step took comes from vLLM's own lines per step (enable_logging_iteration_details).
Its histogram vllm:iteration_tokens_total would mislead: it books a prompt that was read in chunks
as one step of the whole length, the step of the first token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from packhorse.quantize.calibration.dataset import Message
from packhorse.quantize.quality.evaluate import Question
from tests.client import CHAT, TEXT, request_lines, wait_for
from tests.conftest import DEMO, Server, running_server
from tests.e2e.conftest import needs_avx512
from tests.e2e.questions import QUESTIONS, ask_all

CACHE_BYTES = 64 * 1024 * 1024
STEP_TOKENS = 128
BLOCK_TOKENS = 128  # vLLM's own choice on a CPU
# 21 questions; the answers are the longest there are: 35 tokens, each with one right wording.
STORIES = [question for question in QUESTIONS if question.domain == "stories"]
STEP_LINE = re.compile(
    r"Iteration\(\d+\): (\d+) context requests, (\d+) context tokens, "
    r"(\d+) generation requests, (\d+) generation tokens"
)
CACHE_LINE = re.compile(
    r"KV cache: (\d+) tokens \((\w+)\), ([\d.]+) contexts of (\d+) tokens at once"
)


@dataclass(frozen=True)
class Step:
    """One step of the engine: prompts being read (context), answers being written (generation)."""

    context_requests: int
    context_tokens: int
    generation_requests: int
    generation_tokens: int


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str
    usage: dict[str, Any]

    @property
    def cached_tokens(self) -> int:
        return int((self.usage["prompt_tokens_details"] or {}).get("cached_tokens", 0))


class Stream:
    """A streamed answer, read as far as the test asks for."""

    def __init__(self, response: httpx.Response) -> None:
        assert response.status_code == 200, response.read()
        self._lines = response.iter_lines()
        self._texts: list[str] = []
        self._finish_reason = ""
        self._usage: dict[str, Any] = {}

    def read_token(self) -> bool:
        """Wait for the next piece of text; False at the end."""
        for line in self._lines:
            if line in ("", "data: [DONE]"):
                continue
            event = json.loads(line.removeprefix("data: "))
            self._usage = event.get("usage") or self._usage
            for choice in event["choices"]:
                self._finish_reason = choice["finish_reason"] or self._finish_reason
                if text := choice["delta"].get("content"):
                    self._texts.append(text)
                    return True
        return False

    def read_to_the_end(self) -> Answer:
        while self.read_token():
            pass
        return Answer("".join(self._texts), self._finish_reason, self._usage)


@dataclass(frozen=True)
class Client:
    """Requests to one server, and what vLLM says of itself there."""

    server: Server
    http: httpx.Client

    def body(self, messages: list[Message], **fields: Any) -> dict[str, Any]:
        return {"model": self.server.model, "messages": messages, "temperature": 0, **fields}

    def ask(self, messages: list[Message], **fields: Any) -> Answer:
        response = self.http.post(CHAT, json=self.body(messages, **fields))
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        text = choice["message"]["content"]
        return Answer(text, choice["finish_reason"], response.json()["usage"])

    def streaming(self, messages: list[Message], **fields: Any) -> Any:
        """A context manager; its response makes a Stream."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return self.http.stream("POST", CHAT, json=self.body(messages, **options, **fields))

    def stream_whole(self, question: Question, **fields: Any) -> Answer:
        with self.streaming(question.messages, **fields) as response:
            return Stream(response).read_to_the_end()

    def vllm(self, name: str) -> float:
        """The value of one of vLLM's own series, over all its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        values = [line for line in lines if line.startswith((f"vllm:{name}{{", f"vllm:{name} "))]
        assert values, f"/metrics has no vllm:{name}"
        return sum(float(line.rpartition(" ")[2]) for line in values)

    def steps(self) -> list[Step]:
        found = STEP_LINE.findall(self.server.log())
        return [Step(*map(int, numbers)) for numbers in found]


def configured(folder: Path, **engine: Any) -> Path:
    path = folder / "serve.yaml"
    path.write_text(json.dumps({"engine": engine}))  # JSON is YAML
    return path


@contextmanager
def running_client(folder: Path, model: Path, config: Path) -> Iterator[Client]:
    with (
        running_server(folder, str(model), "--config", str(config)) as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        # Plain vLLM's worker dies when the first prompt of its life is this short: docs/lab-log.md.
        short = {"model": server.model, "prompt": [1], "max_tokens": 2, "temperature": 0}
        assert http.post(TEXT, json=short).status_code == 200, server.log()[-4000:]
        yield Client(server, http)


def tokens_that_fit(cache_bytes: int, bytes_per_number: int) -> int:
    """By hand: a key and a value per layer and key-value head, in whole blocks."""
    config = json.loads((DEMO / "model/config.json").read_text())
    numbers = 2 * config["num_key_value_heads"] * config["head_dim"] * config["num_hidden_layers"]
    blocks = cache_bytes // (numbers * bytes_per_number * BLOCK_TOKENS)
    return int(blocks * BLOCK_TOKENS)


def cache_line(server: Server) -> tuple[int, str, float, int]:
    """(tokens, type, contexts, tokens of a context) from the log of the start."""
    found = CACHE_LINE.search(server.log())
    assert found, server.log()[-4000:]
    return int(found[1]), found[2], float(found[3]), int(found[4])


def conversation(start: int, count: int) -> list[Message]:
    """`count` of the demo's questions with their right answers, as a history to go on from."""
    facts = [question for question in QUESTIONS if question.domain == "facts"]
    return [
        message
        for question in facts[start : start + count]
        for message in (*question.messages, {"role": "assistant", "content": question.answer})
    ]


class TestBatching:
    """The demo model in bf16, in steps of at most STEP_TOKENS."""

    @pytest.fixture(scope="class")
    @classmethod
    def client(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
        folder = tmp_path_factory.mktemp("batching")
        config = configured(
            folder,
            kv_cache_memory_bytes=CACHE_BYTES,
            max_num_seqs=16,
            max_num_batched_tokens=STEP_TOKENS,
            enable_chunked_prefill=True,
            enable_prefix_caching=True,
            enable_logging_iteration_details=True,
            enable_log_requests=True,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_LOGGING_LEVEL", "INFO")  # its lines per step
            with running_client(folder, DEMO / "model", config) as client:
                yield client

    def test_the_start_says_how_many_tokens_and_contexts_fit(self, client: Client) -> None:
        tokens, dtype, contexts, context_tokens = cache_line(client.server)
        assert (tokens, dtype) == (tokens_that_fit(CACHE_BYTES, 2), "auto")
        assert context_tokens == 2048
        assert contexts == pytest.approx(tokens / 2048, abs=0.06)
        assert "scales" not in client.server.log()

    def test_eight_requests_run_at_once(self, client: Client) -> None:
        questions = STORIES[:8]
        # Long enough that all eight are still running when the last has begun.
        fields = {"max_tokens": 500, "ignore_eos": True}
        with ThreadPoolExecutor(8) as pool:
            pending = [pool.submit(client.stream_whole, each, **fields) for each in questions]
            wait_for(lambda: client.vllm("num_requests_running") == 8, timeout_s=30)
            answers = [each.result() for each in pending]
        assert max(step.generation_requests for step in client.steps()) == 8
        for question, answer in zip(questions, answers, strict=True):
            assert answer.text.startswith(question.answer)
            assert answer.usage["completion_tokens"] == 500

    def test_a_late_request_joins_a_running_batch(self, client: Client) -> None:
        early, late = STORIES[8:10]
        steps_before = len(client.steps())
        with client.streaming(early.messages, max_tokens=1500, ignore_eos=True) as early_response:
            early_stream = Stream(early_response)
            assert early_stream.read_token()
            with client.streaming(late.messages, max_tokens=300, ignore_eos=True) as late_response:
                late_stream = Stream(late_response)
                assert late_stream.read_token()
                # The late one has its first token, and the early one has not ended.
                wait_for(lambda: client.vllm("num_requests_running") == 2)
                late_answer = late_stream.read_to_the_end()
            wait_for(lambda: client.vllm("num_requests_running") == 1)
            early_answer = early_stream.read_to_the_end()
        assert early_answer.text.startswith(early.answer)
        assert late_answer.text.startswith(late.answer)
        assert early_answer.usage["completion_tokens"] == 1500
        assert late_answer.usage["completion_tokens"] == 300
        # The late prompt was read in a step that wrote a token of the early one.
        steps = client.steps()[steps_before:]
        assert [step for step in steps if step.context_requests and step.generation_requests]

    def test_a_long_prompt_is_read_in_chunks_beside_short_ones(self, client: Client) -> None:
        short, question = STORIES[10], STORIES[11]
        long_prompt = [*conversation(0, 60), *question.messages]
        steps_before = len(client.steps())
        order: list[str] = []
        with (
            ThreadPoolExecutor(1) as pool,
            client.streaming(short.messages, max_tokens=1500, ignore_eos=True) as response,
        ):
            stream = Stream(response)
            assert stream.read_token()

            def read_long_one() -> Answer:
                with client.streaming(long_prompt, max_tokens=64) as long_response:
                    long_stream = Stream(long_response)
                    assert long_stream.read_token()
                    order.append("long")
                    return long_stream.read_to_the_end()

            pending = pool.submit(read_long_one)
            while stream.read_token():
                order.append("short")
            short_answer, long_answer = stream.read_to_the_end(), pending.result()
        assert short_answer.text.startswith(short.answer)
        assert long_answer.text == question.answer
        prompt_tokens = long_answer.usage["prompt_tokens"]
        assert prompt_tokens > 8 * STEP_TOKENS
        assert long_answer.cached_tokens == 0
        # No step took more than it may, the prompt needed many, and each of them but perhaps the
        # first wrote a token of the short one too.
        steps = client.steps()[steps_before:]
        assert max(step.context_tokens + step.generation_tokens for step in steps) <= STEP_TOKENS
        chunks = [step for step in steps if step.context_tokens and step.generation_tokens]
        assert sum(step.context_tokens for step in chunks) >= prompt_tokens - STEP_TOKENS
        assert len(chunks) >= prompt_tokens // STEP_TOKENS
        # The client saw the same: text of the short one, the long one's first, more of the short.
        # (Not a piece for each step: what a client is late to read comes in one.)
        assert order.index("long") >= 2
        assert order[-1] == "short"

    def test_a_prompt_seen_before_comes_from_the_prefix_cache(self, client: Client) -> None:
        first, second = STORIES[12:14]
        history = conversation(60, 20)
        hits, queries = (
            client.vllm("prefix_cache_hits_total"),
            client.vllm("prefix_cache_queries_total"),
        )
        cold = client.ask([*history, *first.messages])
        assert cold.cached_tokens == 0
        assert client.vllm("prefix_cache_hits_total") == hits
        assert client.vllm("prefix_cache_queries_total") == queries + cold.usage["prompt_tokens"]
        again = client.ask([*history, *first.messages])
        other_end = client.ask([*history, *second.messages])
        other_start = client.ask([*conversation(90, 20), *first.messages])
        # Whole blocks only, and at least the last token is always computed.
        whole_blocks = (cold.usage["prompt_tokens"] - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert again.cached_tokens == whole_blocks >= BLOCK_TOKENS
        assert BLOCK_TOKENS <= other_end.cached_tokens <= whole_blocks
        assert other_start.cached_tokens == 0
        saved = again.cached_tokens + other_end.cached_tokens
        assert client.vllm("prefix_cache_hits_total") == hits + saved
        assert cold.text == again.text == other_start.text == first.answer
        assert other_end.text == second.answer

    @pytest.mark.parametrize("fields", [{}, {"logprobs": True}], ids=["plain", "logprobs"])
    def test_the_engine_knows_a_request_by_the_clients_id(
        self, client: Client, fields: dict[str, Any]
    ) -> None:
        """So that a line of its log leads to ours, and to the client's; no line has the prompt."""
        sent = f"from-the-client-{len(fields)}"
        body = client.body([{"role": "user", "content": "Unusual?"}], max_tokens=2, **fields)
        response = client.http.post(CHAT, json=body, headers={"x-request-id": sent})
        assert response.headers["x-request-id"] == sent
        assert f"Added request {sent}" in client.server.log()
        assert sent in [line["request_id"] for line in request_lines(client.server.log())]
        assert "Unusual" not in client.server.log()


class TestPreemption:
    """The 4-bit model with room for 512 tokens, which 21 stories of 50 tokens and more outgrow."""

    @pytest.fixture(scope="class")
    @classmethod
    def client(
        cls, packed_folder: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Client]:
        folder = tmp_path_factory.mktemp("preemption")
        config = configured(
            folder,
            max_model_len=256,
            block_size=32,
            num_gpu_blocks_override=16,
            max_num_seqs=32,
            # Or a preempted request would find its blocks again instead of being computed anew.
            enable_prefix_caching=False,
        )
        with running_client(folder, packed_folder, config) as client:
            yield client

    def test_the_start_says_how_little_fits(self, client: Client) -> None:
        assert cache_line(client.server) == (512, "auto", 2.0, 256)

    def test_preempted_requests_still_get_right_answers(self, client: Client) -> None:
        assert client.vllm("num_preemptions_total") == 0
        # Eight that go on after their answer need three times the room there is.
        questions = STORIES[:8]
        fields = {"max_tokens": 150, "ignore_eos": True}
        with ThreadPoolExecutor(len(questions)) as pool:
            pending = [pool.submit(client.stream_whole, each, **fields) for each in questions]
            answers = [each.result() for each in pending]
        assert client.vllm("num_preemptions_total") >= 1
        for question, answer in zip(questions, answers, strict=True):
            assert answer.text.startswith(question.answer)
            assert answer.usage["completion_tokens"] == 150
        wait_for(lambda: client.vllm("num_requests_running") == 0)
        assert client.vllm("kv_cache_usage_perc") == 0


@needs_avx512
class TestEightBitCache:
    """The INT8 model with an fp8 cache in the same memory as the first server's."""

    @pytest.fixture(scope="class")
    @classmethod
    def client(
        cls, int8_folder: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Client]:
        folder = tmp_path_factory.mktemp("fp8")
        config = configured(folder, kv_cache_memory_bytes=CACHE_BYTES, kv_cache_dtype="fp8")
        with running_client(folder, int8_folder, config) as client:
            yield client

    def test_twice_as_many_tokens_fit(self, client: Client) -> None:
        tokens, dtype, _, _ = cache_line(client.server)
        assert (tokens, dtype) == (tokens_that_fit(CACHE_BYTES, 1), "fp8")
        assert tokens / tokens_that_fit(CACHE_BYTES, 2) == pytest.approx(2, abs=0.01)

    def test_missing_scales_are_told(self, client: Client) -> None:
        lines = [line for line in client.server.log().splitlines() if "scales" in line]
        assert len(lines) == 1, lines
        assert "WARNING" in lines[0]
        assert "1.0" in lines[0]

    def test_the_score_is_kept(self, client: Client) -> None:
        score = ask_all(client.server, QUESTIONS)
        assert score.accuracy >= 0.92, score.as_json()


def test_an_unknown_engine_field_is_an_error_that_names_near_misses(tmp_path: Path) -> None:
    config = configured(tmp_path, kv_cache_dtyp="fp8")
    with pytest.raises(AssertionError, match="the server ended with 2") as ended:  # noqa: SIM117
        with running_server(tmp_path, str(DEMO / "model"), "--config", str(config)):
            pass
    said = " ".join(str(ended.value).split())
    assert "engine.kv_cache_dtyp" in said
    assert "did you mean kv_cache_dtype" in said
    assert "Traceback" not in said
