"""opencode, on one of its providers: for compatible servers, OpenAI (Responses) or Anthropic."""

from __future__ import annotations

import json
from typing import Any

from agent import COMMAND, MARKER, MODULES, Home, Run, ended_well, home, run, scripted
from common import API, BASE_URL, CAPITAL, KEY, MODEL, WRONG_KEY, call, main, said

PROGRAM = MODULES / "opencode-linux-x64-baseline/bin/opencode"
PROVIDERS = {
    "chat": "@ai-sdk/openai-compatible",
    "responses": "@ai-sdk/openai",
    "messages": "@ai-sdk/anthropic",
}
QUIET = {
    f"OPENCODE_DISABLE_{name}": "1"
    for name in (
        "AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD", "DEFAULT_PLUGINS", "SHARE", "CLAUDE_CODE",
    )
}  # fmt: skip


def settings(key: str, may_run: bool) -> dict[str, Any]:
    model = {"name": MODEL, "limit": {"context": 60_000, "output": 300}}
    provider = {
        "npm": PROVIDERS[API],
        "name": "packhorse",
        "options": {"baseURL": BASE_URL, "apiKey": key},
        "models": {MODEL: model},
    }
    others = ("edit", "webfetch", "websearch", "task", "skill", "external_directory")
    return {
        "$schema": "https://opencode.ai/config.json",
        "autoupdate": False,
        "share": "disabled",
        "enabled_providers": ["packhorse"],
        "provider": {"packhorse": provider},
        "model": f"packhorse/{MODEL}",
        "small_model": f"packhorse/{MODEL}",
        "permission": {**dict.fromkeys(others, "deny"), "bash": "allow" if may_run else "deny"},
    }


def ask(where: Home, text: str, *more: str, key: str = KEY, may_run: bool = False) -> Run:
    """The prompt goes in by standard input: of an argument opencode makes a quoted word."""
    config = json.dumps(settings(key, may_run))
    environment = where.environment(**QUIET, OPENCODE_CONFIG_CONTENT=config)
    return run([PROGRAM, "run", "--format", "json", *more], where, environment, text)


def text_of(done: Run) -> str:
    return "".join(e["part"]["text"] for e in done.events if e["type"] == "text")


def used(done: Run) -> list[dict[str, Any]]:
    return [event["part"] for event in done.events if event["type"] == "tool_use"]


@call
def chat() -> Any:
    with home() as where:
        done = ended_well(ask(where, CAPITAL))
        return {**said(text_of(done)), "refused": where.outside}


@call
def tools() -> Any:
    """It calls its shell, sends the output back, and ends with an answer; then a second turn."""
    with home() as where:
        asked = scripted("bash", {"command": COMMAND, "description": "Multiplies"})
        first = ended_well(ask(where, asked, may_run=True))
        (part,) = used(first)
        if part["state"]["status"] != "completed" or MARKER not in part["state"]["output"]:
            raise AssertionError(f"the tool: {part['state']}")
        if MARKER not in text_of(first):
            raise AssertionError(f"the result did not come back: {first.told()}")
        second = ended_well(ask(where, "And now in a word.", "--continue", may_run=True))
        if "in a word" not in text_of(second):
            raise AssertionError(f"the second turn: {second.told()}")
        return {"tool": part["tool"], **said(text_of(first)), "refused": where.outside}


@call
def wrong_key() -> Any:
    with home() as where:
        done = ask(where, CAPITAL, key=WRONG_KEY)
        errors = [event["error"]["data"] for event in done.events if event["type"] == "error"]
        if [error.get("statusCode") for error in errors] != [401]:
            raise AssertionError(f"not 401: {done.told()}")
        return {"message": errors[0]["message"][:300]}


if __name__ == "__main__":
    main()
