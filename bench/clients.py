"""Every client of tests/clients against plain vLLM and against ours, on the same checkpoints, one
server after the other. Writes docs/clients.md and ends in one line of JSON.

    python bench/clients.py                 # 15 minutes; needs what `make clients` makes
    python bench/clients.py --client llm    # some of them, without docs/clients.md

Loopback only. What counts as answered is said in the programs of tests/clients/programs; both
servers get the same key, tool parser and length of context. Coding agents have servers with a long
context, and for whole tasks our engine `vllm-echo`, which plain vLLM has no twin of; embeddings
have an embedding model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from servers import ENGINE, MODEL, Server, packhorse_with, plain_vllm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.clients.catalogue import (  # noqa: E402
    CLIENTS,
    LONG_CONTEXT,
    Client,
    Outcome,
    minilm,
)
from tests.clients.page import page  # noqa: E402

KEY = "ph-a-key-of-the-clients-bench"
MAX_MODEL_LEN = 2048
PARSER = "hermes"
NO_SPACE = {"backend": "xgrammar", "disable_any_whitespace": True}
Outcomes = dict[str, dict[str, Outcome]]
Kind = Literal["usual", "long", "script", "embedding"]
"""What a server is for: most clients; agents; agents' whole tasks; embeddings."""
ENGINES: dict[Kind, dict[str, Any]] = {
    "usual": {"max_model_len": MAX_MODEL_LEN, "tool_call_parser": PARSER},
    "long": {**LONG_CONTEXT, "tool_call_parser": PARSER},
    "script": {**LONG_CONTEXT, "tool_call_parser": PARSER, "kind": "vllm-echo"},
    "embedding": {},
}


def calls_of(client: Client, kind: Kind) -> tuple[str, ...]:
    """What a client asks of a server of this kind."""
    if kind == "script":
        return client.scripted
    own: Kind = "long" if client.is_agent else "usual"
    if client.api == "embeddings":
        own = "embedding"
    return client.calls if kind == own else ()


@contextmanager
def ours(kind: Kind, folder: Path, work_folder: Path) -> Iterator[Server]:
    settings: dict[str, Any] = {
        "engine": {**ENGINE, **ENGINES[kind]},
        "auth": {"api_key": KEY},
        "batches": {"folder": str(work_folder / "batches")},
    }
    with packhorse_with(folder, work_folder, settings) as server:
        yield server


@contextmanager
def plain(kind: Kind, folder: Path, work_folder: Path) -> Iterator[Server]:
    more: list[Any] = ["--api-key", KEY]
    for name, value in ENGINES[kind].items():
        text = json.dumps(value) if isinstance(value, dict) else value
        more += ["--" + name.replace("_", "-"), text]
    if kind != "embedding":
        more += ["--enable-auto-tool-choice"]
        # Ours bounds white space by itself. Without a bound the demo model fills its JSON with it.
        more += ["--structured-outputs-config", json.dumps(NO_SPACE)]
    with plain_vllm(folder, work_folder, more) as server:
        yield server


SERVERS = {"vllm": plain, "packhorse": ours}
KINDS: dict[str, tuple[Kind, ...]] = {
    "vllm": ("usual", "long", "embedding"),
    "packhorse": ("usual", "long", "script", "embedding"),
}


def matrix(name: str, folder: Path, clients: list[Client]) -> Outcomes:
    """What the server `name` answers, by client."""
    found: Outcomes = {client.name: {} for client in clients}
    for kind in KINDS[name]:
        asking = [client for client in clients if calls_of(client, kind)]
        model = minilm() if kind == "embedding" else folder
        if not asking or model is None:
            continue
        with tempfile.TemporaryDirectory() as made:
            print(f"{name}, {kind}: starting", file=sys.stderr, flush=True)
            with SERVERS[name](kind, model, Path(made)) as server:
                for client in asking:
                    calls = calls_of(client, kind)
                    outcomes = client.run(server.target.url + "/v1", MODEL, KEY, calls)
                    found[client.name] |= outcomes
                    good = sum(outcome.ok for outcome in outcomes.values())
                    print(f"  {client.name}: {good} of {len(calls)}", file=sys.stderr, flush=True)
    return found


def summary(found: dict[str, Outcomes]) -> dict[str, Any]:
    """Counts, and each call that is not answered: by ours alone, by vLLM alone, by both."""
    calls = [(name, call) for name in next(iter(found.values())) for call in _calls(found, name)]
    scripted = [(client.name, call) for client in CLIENTS for call in client.scripted]

    def good(server: str, name: str, call: str) -> bool:
        return found[server][name][call].ok

    counts: dict[str, Any] = {"calls": len(calls)}
    for server in found:
        counts[server] = sum(good(server, *call) for call in calls)
    for title, vllm, packhorse in (
        ("packhorse_alone_fails", True, False),
        ("vllm_alone_fails", False, True),
        ("both_fail", False, False),
    ):
        if len(found) == len(SERVERS):
            counts[title] = [
                " ".join(call)
                for call in calls
                if (good("vllm", *call), good("packhorse", *call)) == (vllm, packhorse)
            ]
    if "packhorse" in found:
        tried = [
            (name, call) for name, call in scripted if call in found["packhorse"].get(name, {})
        ]
        counts["scripted"] = len(tried)
        counts["scripted_packhorse"] = sum(good("packhorse", *each) for each in tried)
    return counts


def _calls(found: dict[str, Outcomes], name: str) -> list[str]:
    """What all servers were asked by a client."""
    first, *others = (outcomes[name] for outcomes in found.values())
    scripted = next(client.scripted for client in CLIENTS if client.name == name)
    return [call for call in first if all(call in o for o in others) and call not in scripted]


def vllm_version() -> str:
    """Of whichever build is installed."""
    return metadata.version(metadata.packages_distributions()["vllm"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, default=ROOT / "out/demo-int8", help="made by make demo"
    )
    parser.add_argument("--client", action="append", help="a part of a client's name; several")
    parser.add_argument("--server", action="append", choices=list(SERVERS), help="one of both")
    parser.add_argument("--out", type=Path, help="what was said in every call, as JSON")
    options = parser.parse_args()
    wanted = [c for c in CLIENTS if not options.client or any(p in c.name for p in options.client)]
    clients = []
    for client in wanted:
        if lacking := client.missing():
            print(f"{client.name}: left out, there is no {lacking}", file=sys.stderr, flush=True)
        else:
            clients.append(client)
    found: dict[str, Outcomes] = {}
    for name in options.server or SERVERS:
        found[name] = matrix(name, options.model.resolve(), clients)
    if options.out:
        plain_data = {
            server: {
                name: {call: vars(outcome) for call, outcome in outcomes.items()}
                for name, outcomes in by_client.items()
            }
            for server, by_client in found.items()
        }
        options.out.write_text(json.dumps(plain_data, indent=1) + "\n", encoding="utf-8")
    if clients == list(CLIENTS) and len(found) == len(SERVERS):
        (ROOT / "docs/clients.md").write_text(page(found, vllm_version()), encoding="utf-8")
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
