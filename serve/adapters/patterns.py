"""PEFT's rank_pattern and alpha_pattern: ranks and alphas for some of the modules.

Their keys are regular expressions from whoever made the adapter. A hostile one could run for years,
here and in the engine's worker. So only expressions with a small bound on their work are accepted,
and the copy for the engine names modules in full instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod
from typing import TypeVar

from packhorse.serve.adapters.headers import shown
from packhorse.serve.errors import Invalid

Value = TypeVar("Value")

_MAX_KEYS = 4096
_MAX_KEY_LENGTH = 256
_MAX_OPEN_KEYS = 16
_MAX_REPEATS = 2
_MAX_ALTERNATIVES = 128
_REPEAT = re.compile(r"(?:[*+?]|\{[^{}]*\})\??")
_GROUP = re.compile(r"\((?!\?)[^()]*\)")


def matcher(field: str, pattern: Mapping[str, Value]) -> Callable[[str], Value | None]:
    """A function from a module's name to the value of the first key that matches it, or None.

    A key matches a module whose name it is, or whose name ends with it after a dot. `field` is for
    messages. Raises Invalid for too many keys, or one that could take long to match or is no
    expression.

    Source: get_pattern_key in PEFT 0.21, utils/other.py; vLLM 0.32, lora/peft_helper.py.
    """
    if len(pattern) > _MAX_KEYS:
        raise Invalid(
            f"adapter_config.json's {field} has {len(pattern)} keys, above the limit of "
            f"{_MAX_KEYS}; one key can stand for many modules (`q_proj`)."
        )
    if sum(bool(_REPEAT.search(key)) for key in pattern) > _MAX_OPEN_KEYS:
        raise Invalid(
            f"adapter_config.json's {field} has more than {_MAX_OPEN_KEYS} keys with `*` or the "
            "like; write module names instead."
        )
    compiled = [(_compile(field, key), value) for key, value in pattern.items()]

    def value_of(module: str) -> Value | None:
        return next((value for expression, value in compiled if expression.match(module)), None)

    return value_of


def _compile(field: str, key: str) -> re.Pattern[str]:
    if len(key) > _MAX_KEY_LENGTH or not _ends_soon(key):
        raise Invalid(
            f"adapter_config.json's {field} has the key {shown(key)}, which could take long to "
            f"match: at most {_MAX_KEY_LENGTH} characters, {_MAX_REPEATS} repetitions (`*`), none "
            f"of a group, and {_MAX_ALTERNATIVES} alternatives are taken; write module names "
            "instead."
        )
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise Invalid(
            f"adapter_config.json's {field} has the key {shown(key)}, which is not a regular "
            f"expression: {error}; write a module name instead."
        ) from error


def _ends_soon(key: str) -> bool:
    """Whether matching is bounded: without repeated or nested groups and with few repetitions, the
    work is a low power of the module name's length.
    """
    if re.search(r"--|&&|~~|\|\|", key):  # set operations, reserved for later versions of `re`
        return False
    plain = re.sub(r"\\[.dwDW_-]", "x", key)
    plain = re.sub(r"\[[^\[\]]*\]", "x", plain)
    groups = _GROUP.findall(plain)
    outside = _GROUP.sub("()", plain)
    if re.search(r"\)(?:[*+?{])", outside) or re.search(r"[()\\\[\]]", outside.replace("()", "")):
        return False
    alternatives = prod(part.count("|") + 1 for part in (*groups, outside))
    return len(_REPEAT.findall(plain)) <= _MAX_REPEATS and alternatives <= _MAX_ALTERNATIVES
