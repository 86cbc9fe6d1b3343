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

PROGRAMS = Path(__file__).resolve().parent / "programs"
ROOT = PROGRAMS.parents[2]
MADE = ROOT / "out" / "clients"
"""What tools/setup_clients.py makes: `new` and `old` (Python), `node`."""
PINS = ROOT / "tests" / "clients" / "pins"

USUAL = (
    "chat", "stream", "tools", "tools_streamed", "structured", "wrong_key", "unknown_model",
    "too_long",
)  # fmt: skip
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Client:
    """One client library or program."""

    name: str
    program: str
    home: str
    """What runs it: `own` Python, `new` or `old` Python of the clients', `node`, `java`."""
    calls: tuple[str, ...]
    packages: tuple[str, ...] = ()
    """Whose versions docs/clients.md names."""
    command: str | None = None
    """A program of the system that it needs."""
    environment: Mapping[str, str] = field(default_factory=dict)
    dialects: bool = False
    """Whether its calls are its own rather than the usual ones."""

    def missing(self) -> str | None:
        """What keeps it from running here, in a word."""
        if self.command and shutil.which(self.command) is None:
            return self.command
        if self.home in ("new", "old", "node") and not _interpreter(self.home).exists():
            return "clients"
        return None

    def run(
        self, base_url: str, model: str, key: str, calls: Sequence[str] = ()
    ) -> dict[str, Outcome]:
        """Outcomes by call; `base_url` ends in /v1."""
        asked = [*(calls or self.calls)]
        command = [*_start(self.home), PROGRAMS / self.program, base_url, model, key, *asked]
        # No proxies: the server is on this machine.
        kept = {name: text for name, text in os.environ.items() if "proxy" not in name.lower()}
        environment = {**kept, **self.environment, "CLIENT_MODULES": str(MADE / "node")}
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
    if home == "node":
        return MADE / "node" / "node_modules" / "openai"
    return MADE / home / "bin" / "python"


def _start(home: str) -> list[Path | str]:
    if home == "own":
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


def usual(*more: str, without: Sequence[str] = ()) -> tuple[str, ...]:
    return tuple(name for name in USUAL if name not in without) + more


MODELS = ("models", "model", "completions")
SYSTEM = ("chat", "stream", "tools", "wrong_key", "unknown_model", "too_long", "models")
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
