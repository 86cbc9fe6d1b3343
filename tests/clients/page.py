"""docs/clients.md, from what bench/clients.py found."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from importlib import metadata

from tests.clients.catalogue import BATCHES, CLIENTS, EMBEDDINGS, PINS, USUAL, Client, Outcome

Outcomes = dict[str, dict[str, Outcome]]
REASON_CHARS = 150

HEAD = """# Clients

Client libraries, coding agents and programs, tried against this server and against plain
vLLM {vllm} on the same INT8 checkpoint of the demo model (embeddings: on all-MiniLM-L6-v2), in one
run. `bench/clients.py` writes this page; do not edit it.

## To check a client of your own

```sh
packhorse serve out/demo-int8
curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
    -d '{{"model": "demo-int8", "prompt": "Hello!", "topk": 5}}' \\
    --dump-header - --output /dev/null | grep -i x-packhorse-ignored      # fields without effect
```

```python
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
print([model.id for model in client.models.list()])
```

Any other client needs the same two settings: the base URL, with `/v1`, and some key. Anthropic's
clients add `/v1` themselves.

Codex takes them in `~/.codex/config.toml`, and opencode in `opencode.json`, where `npm` chooses
the API:

```text
model = "demo-int8"
model_provider = "packhorse"

[model_providers.packhorse]
name = "packhorse"
base_url = "http://127.0.0.1:8000/v1"
env_key = "OPENAI_API_KEY"
wire_api = "responses"
```

```json
{{
  "model": "packhorse/demo-int8",
  "provider": {{
    "packhorse": {{
      "npm": "@ai-sdk/anthropic",
      "options": {{ "baseURL": "http://127.0.0.1:8000/v1", "apiKey": "none" }},
      "models": {{ "demo-int8": {{ "limit": {{ "context": 32768, "output": 4096 }} }} }}
    }}
  }}
}}
```

Both begin with some 8,000 words, so the model needs a context of 32,000 tokens or more, and the
server `--tool-call-parser`.

To repeat the table (loopback only): `make demo`, `make clients`,
`.venv/bin/python bench/clients.py`.
`tests/e2e/test_clients.py` makes the same calls to this server: openai and anthropic for Python,
Java, curl, wget and bare sockets in `make test`, all of them in `make test-all`.

## What was tried

`yes` or `no` holds for both servers, `yes / no` for this one and plain vLLM. Of {calls} calls
this server answers {packhorse} as they should be, plain vLLM {plain}.

- **chat**, **stream** (more than one part, then usage), **structured** (a JSON schema, read back by
  the library), **models**, **model** (one of them by its name), **completions**.
- **tools**: a forced call; the library's own message goes back with the tool's result, and text is
  the answer. **tools_streamed**: the same with a message put together from a stream.
- **wrong_key**, **unknown_model**, **too_long**: refused with 401, 404, 400, and with the library's
  own exception for that where it has one: LiteLLM's `ContextWindowExceededError`, LangChain's
  `ContextOverflowError`, pydantic-ai's `ModelContextWindowExceededError`.
- **stored** (Responses): an answer is kept, continued by `previous_response_id`, read, deleted;
  **not_stored**: with `store: false` it is not; **background**, **input_tokens**, **count_tokens**.

Both servers have a key, the tool parser `hermes`, and 2048 tokens of context. Plain vLLM runs with
`disable_any_whitespace`: without it the demo model fills its JSON with white space until the limit,
which this server bounds by itself (`engine.max_json_whitespace`).
"""


GROUPS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("Chat completions", ("chat",), USUAL),
    ("Responses", ("responses",), USUAL),
    ("Messages", ("messages",), USUAL),
    ("Embeddings", ("embeddings",), EMBEDDINGS),
    ("Files and batches", ("batches",), BATCHES),
)
"""Tables of libraries: title, APIs, columns."""
AGENTS = """### Coding agents

Each has a home folder of its own, and a proxy that refuses whatever is not this machine.

- **chat**: a turn that the model answers, after the agent's own 20,000 tokens; on a context of
  40,960, which the demo model was not trained for.
- **tools**: a whole task. The agent runs a command in its shell, sends the output back, ends, and
  goes on in a second turn. The demo model is too small for it: the engine `vllm-echo` answers with
  the text of the prompt, which holds the call in the model's own words, and vLLM's tool parser
  reads it. Plain vLLM has no such engine, and was not asked (`-`).
"""


def page(found: dict[str, Outcomes], vllm: str) -> str:
    """`found` has the outcomes of the servers `packhorse` and `vllm`, by client and call."""
    ours, plain = found["packhorse"], found["vllm"]
    both = [(name, call) for name in ours for call in ours[name] if call in plain[name]]
    parts = [
        HEAD.format(
            vllm=vllm, calls=len(both), packhorse=_good(ours, both), plain=_good(plain, both)
        )
    ]
    for title, apis, columns in GROUPS:
        group = [c for c in CLIENTS if not (c.dialects or c.is_agent) and c.api in apis]
        parts.append(f"### {title}\n")
        parts.append(
            _table(["client", "version", *columns, "others"], _rows(group, columns, found))
        )
    parts.append(AGENTS)
    agents = [client for client in CLIENTS if client.is_agent]
    columns = tuple(dict.fromkeys(call for c in agents for call in (*c.calls, *c.scripted)))
    parts.append(_table(["agent", "version", "API", *columns], _rows(agents, columns, found)))
    parts.append("\n## What other clients and proxies send\n")
    for client in CLIENTS:
        if client.dialects:
            rows = [
                [f"`{call}`", word(ours[client.name][call], plain[client.name][call])]
                for call in client.calls
            ]
            parts.append(_table([client.name, "answered as it should be"], rows))
    reasons = [
        [name, f"`{call}`", _told(ours[name][call]), _told(plain[name].get(call))]
        for name, outcomes in ours.items()
        for call in outcomes
        if not (ours[name][call].ok and plain[name].get(call, ours[name][call]).ok)
    ]
    parts.append("\n## What was said where the answer is no\n")
    parts.append(_table(["client", "call", "this server", "plain vLLM"], reasons))
    return "\n".join(parts)


def word(ours: Outcome, plain: Outcome | None) -> str:
    """`plain` None: only this server was asked."""
    first = "yes" if ours.ok else "no"
    if plain is None:
        return f"{first} / -"
    second = "yes" if plain.ok else "no"
    return first if first == second else f"{first} / {second}"


def _good(outcomes: Outcomes, calls: Sequence[tuple[str, str]]) -> int:
    return sum(outcomes[name][call].ok for name, call in calls)


def _rows(
    clients: list[Client], columns: Sequence[str], found: dict[str, Outcomes]
) -> list[list[str]]:
    rows = []
    for client in clients:
        mine, theirs = found["packhorse"][client.name], found["vllm"][client.name]
        cells = [word(mine[call], theirs.get(call)) if call in mine else "" for call in columns]
        head = [client.name, versions(client)]
        if client.is_agent:
            rows.append([*head, client.api, *cells])
            continue
        others = [
            f"{call} {word(mine[call], theirs.get(call))}" for call in mine if call not in columns
        ]
        rows.append([*head, *cells, ", ".join(others)])
    return rows


def versions(client: Client) -> str:
    """As pinned; of our own environment, what is installed. The system's programs have none."""
    if not client.packages:
        return ""
    if client.home == "own":
        return ", ".join(metadata.version(name) for name in client.packages)
    if client.home in ("node", "agent"):
        text = (PINS / "package.json").read_text(encoding="utf-8")
        found = [re.search(rf'"{name}": "([^"]+)"', text) for name in client.packages]
    else:
        text = (PINS / f"{client.home}.txt").read_text(encoding="utf-8")
        found = [re.search(rf"^{name}==(\S+)$", text, re.MULTILINE) for name in client.packages]
    return ", ".join(match[1] for match in found if match)


def _told(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not asked"
    if outcome.ok:
        return "answered"
    short = outcome.told[:REASON_CHARS] + ("…" if len(outcome.told) > REASON_CHARS else "")
    # Not the port, which is another one each time.
    short = re.sub(r"127\.0\.0\.1:\d+", "SERVER", short)
    return html.escape(short, quote=False).replace("|", "\\|").replace("\n", " ")


def _table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
