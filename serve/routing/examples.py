"""Example prompts: reading them, and finding the prompts that several adapters have.

Files are JSONL, one `{"prompt": TEXT}` a line, as `examples.jsonl` beside an adapter's weights and
as `learned.none_examples` of the routes file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from packhorse.serve.errors import Invalid
from packhorse.serve.routing.text import casefolded

MAX_FILE_BYTES = 32 << 20


def read_examples(path: Path) -> list[str]:
    """The prompts of a JSONL file; blank lines and fields other than `prompt` are ignored. Raises
    Invalid with the line.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise Invalid(f"{path}: {size} bytes, above the limit of {MAX_FILE_BYTES}.")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise Invalid(f"{path}: cannot be read: {error.strerror}.") from error
    prompts: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: Any = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Invalid(f"{path}: line {number}: not JSON: {error}.") from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise Invalid(
                f'{path}: line {number}: must be {{"prompt": TEXT}}, with some text in it.'
            )
        prompts.append(prompt)
    return prompts


def duplicates(examples: Mapping[str, Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Prompts that more than one name has, with those names, in order. Prompts are compared without
    case, character width and white space.
    """
    owners: dict[str, dict[str, str]] = {}
    for name, prompts in examples.items():
        for prompt in prompts:
            owners.setdefault(" ".join(casefolded(prompt).split()), {}).setdefault(name, prompt)
    return [
        (next(iter(by_name.values())), list(by_name))
        for by_name in owners.values()
        if len(by_name) > 1
    ]
