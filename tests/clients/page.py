"""docs/clients.md, from what bench/clients.py found."""

from __future__ import annotations

import html
import re
from importlib import metadata

from tests.clients.catalogue import CLIENTS, PINS, USUAL, Client, Outcome

Outcomes = dict[str, dict[str, Outcome]]
REASON_CHARS = 150

HEAD = """# Clients

Client libraries and programs, tried against this server and against plain vLLM {vllm} on
the same INT8 checkpoint of the demo model, in one run. `bench/clients.py` writes this page; do not
edit it.

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

Any other client needs the same two settings: the base URL, with `/v1`, and some key.

To repeat the table (loopback only): `make demo`, `make clients`,
`.venv/bin/python bench/clients.py`.
`tests/e2e/test_clients.py` makes the same calls to this server: openai for Python, Java, curl, wget
and bare sockets in `make test`, all of them in `make test-all`.

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

Both servers have a key, the tool parser `hermes`, and 2048 tokens of context. Plain vLLM runs with
`disable_any_whitespace`: without it the demo model fills its JSON with white space until the limit,
which this server bounds by itself (`engine.max_json_whitespace`).
"""


def page(found: dict[str, Outcomes], vllm: str) -> str:
    """`found` has the outcomes of the servers `packhorse` and `vllm`, by client and call."""
    ours, plain = found["packhorse"], found["vllm"]
    parts = [
        HEAD.format(
            vllm=vllm, calls=sum(map(len, ours.values())), packhorse=_good(ours), plain=_good(plain)
        )
    ]
    usual = [client for client in CLIENTS if not client.dialects]
    parts.append(_table(["client", "version", *USUAL, "others"], _rows(usual, ours, plain)))
    parts.append("\n## What other clients and proxies send\n")
    for client in CLIENTS:
        if client.dialects:
            rows = [
                [f"`{call}`", word(ours[client.name][call], plain[client.name][call])]
                for call in client.calls
            ]
            parts.append(_table([client.name, "answered as it should be"], rows))
    reasons = [
        [name, f"`{call}`", _told(ours[name][call]), _told(plain[name][call])]
        for name, outcomes in ours.items()
        for call in outcomes
        if not (ours[name][call].ok and plain[name][call].ok)
    ]
    parts.append("\n## What was said where the answer is no\n")
    parts.append(_table(["client", "call", "this server", "plain vLLM"], reasons))
    return "\n".join(parts)


def word(ours: Outcome, plain: Outcome) -> str:
    first, second = ("yes" if outcome.ok else "no" for outcome in (ours, plain))
    return first if first == second else f"{first} / {second}"


def _good(outcomes: Outcomes) -> int:
    return sum(outcome.ok for calls in outcomes.values() for outcome in calls.values())


def _rows(clients: list[Client], ours: Outcomes, plain: Outcomes) -> list[list[str]]:
    rows = []
    for client in clients:
        mine, theirs = ours[client.name], plain[client.name]
        cells = [word(mine[call], theirs[call]) if call in mine else "" for call in USUAL]
        others = [f"{call} {word(mine[call], theirs[call])}" for call in mine if call not in USUAL]
        rows.append([client.name, versions(client), *cells, ", ".join(others)])
    return rows


def versions(client: Client) -> str:
    """As pinned; of our own environment, what is installed. The system's programs have none."""
    if not client.packages:
        return ""
    if client.home == "own":
        return ", ".join(metadata.version(name) for name in client.packages)
    if client.home == "node":
        text = (PINS / "package.json").read_text(encoding="utf-8")
        found = [re.search(rf'"{name}": "([^"]+)"', text) for name in client.packages]
    else:
        text = (PINS / f"{client.home}.txt").read_text(encoding="utf-8")
        found = [re.search(rf"^{name}==(\S+)$", text, re.MULTILINE) for name in client.packages]
    return ", ".join(match[1] for match in found if match)


def _told(outcome: Outcome) -> str:
    if outcome.ok:
        return "answered"
    short = outcome.told[:REASON_CHARS] + ("…" if len(outcome.told) > REASON_CHARS else "")
    # Not the port, which is another one each time.
    short = re.sub(r"127\.0\.0\.1:\d+", "SERVER", short)
    return html.escape(short, quote=False).replace("|", "\\|").replace("\n", " ")


def _table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
