"""OpenAI's Codex CLI, which speaks Responses alone."""

from __future__ import annotations

from typing import Any

from agent import COMMAND, MARKER, MODULES, Home, Run, ended_well, home, run, scripted
from common import BASE_URL, CAPITAL, KEY, MODEL, WRONG_KEY, call, main, said

PROGRAM = (MODULES.parent.parent / "new/bin/node", MODULES / "@openai/codex/bin/codex.js")
SETTINGS = f"""
model = "{MODEL}"
model_provider = "packhorse"
model_context_window = 60000
check_for_update_on_startup = false

[model_providers.packhorse]
name = "packhorse"
base_url = "{BASE_URL}"
env_key = "CLIENT_KEY"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0

[analytics]
enabled = false

[feedback]
enabled = false

[features]
apps = false
plugins = false
remote_plugin = false
"""
READ_ONLY = ("--sandbox", "read-only")
FREE = ("--dangerously-bypass-approvals-and-sandbox",)
"""For commands of this file alone: its sandbox needs what containers do not give."""


def ask(where: Home, text: str, *more: str, key: str = KEY) -> Run:
    """The prompt goes in by standard input."""
    folder = where.folder / "codex"
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(SETTINGS)
    environment = where.environment(CODEX_HOME=str(folder), CLIENT_KEY=key)
    command = [*PROGRAM, "exec", *more, "-"]
    return run(command, where, environment, text)


def items(done: Run, kind: str) -> list[dict[str, Any]]:
    ended = [event["item"] for event in done.events if event["type"] == "item.completed"]
    return [item for item in ended if item["type"] == kind]


def text_of(done: Run) -> str:
    return "\n".join(item["text"] for item in items(done, "agent_message"))


def ended(done: Run) -> Run:
    ended_well(done)
    last = done.events[-1]
    if last["type"] != "turn.completed" or not last["usage"]["output_tokens"]:
        raise AssertionError(done.told())
    return done


@call
def chat() -> Any:
    with home() as where:
        done = ended(ask(where, CAPITAL, "--json", "--skip-git-repo-check", *READ_ONLY))
        return {**said(text_of(done)), **done.events[-1]["usage"], "refused": where.outside}


@call
def tools() -> Any:
    """It runs a command, sends the output back, and ends with an answer; then a second turn."""
    with home() as where:
        asked = scripted("exec_command", {"cmd": COMMAND})
        first = ended(ask(where, asked, "--json", "--skip-git-repo-check", *FREE))
        (ran,) = items(first, "command_execution")
        if ran["exit_code"] != 0 or MARKER not in ran["aggregated_output"]:
            raise AssertionError(f"the command: {ran}")
        if MARKER not in text_of(first):
            raise AssertionError(f"the result did not come back: {first.told()}")
        resumed = ("resume", "--last", "--json", "--skip-git-repo-check", *FREE)
        second = ended(ask(where, "And now in a word.", *resumed))
        if "in a word" not in text_of(second):
            raise AssertionError(f"the second turn: {second.told()}")
        return {"ran": ran["command"], **said(text_of(first)), "refused": where.outside}


@call
def wrong_key() -> Any:
    with home() as where:
        done = ask(where, CAPITAL, "--json", "--skip-git-repo-check", *READ_ONLY, key=WRONG_KEY)
        faults = [e["error"]["message"] for e in done.events if e["type"] == "turn.failed"]
        if not faults or "401" not in faults[-1]:
            raise AssertionError(f"not 401: {done.told()}")
        return {"message": faults[-1][:300]}


if __name__ == "__main__":
    main()
