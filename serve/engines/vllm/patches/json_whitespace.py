"""JSON grammars with a bound on white space.

JSON allows any amount of white space between its parts, and so do vLLM's grammars: a model that
likes spaces fills its answer with them until max_tokens, and the JSON never ends. The two backends
that vLLM chooses from (xgrammar, llguidance) can bound it, but vLLM has no setting for that.
plugin.py installs this in the process that compiles grammars, which is the engine core's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.v1.structured_output import backend_guidance, backend_xgrammar
from vllm.v1.structured_output.backend_types import StructuredOutputOptions

from packhorse.serve.engines.vllm.patches import probing

NAME = "json_whitespace"
KIND = "speed"
APPLIES_TO = {
    "vllm.v1.structured_output.backend_xgrammar": {
        "XgrammarBackend.compile_grammar": "sha256:04bf0e69c56de34e",
        "XgrammarBackend.__post_init__": "sha256:7683b14d2a4b967e",
    },
    "vllm.v1.structured_output.backend_guidance": {
        "GuidanceBackend.compile_grammar": "sha256:0b6082d3e641392f",
        "GuidanceBackend": "names: disable_any_whitespace",
    },
    "vllm.v1.structured_output.backend_types": {
        "StructuredOutputBackend": "names: vllm_config",
    },
}
WITHOUT = "engine.max_json_whitespace has no effect: a model may fill its JSON with white space."

KEY = "packhorse_max_json_whitespace"
"""In vLLM's `additional_config`, which reaches all its processes. Absent: vLLM's grammars."""

JSON_KINDS = {StructuredOutputOptions.JSON, StructuredOutputOptions.JSON_OBJECT}


def probe(root: Path | None = None) -> str | None:
    return probing.reason(APPLIES_TO, root)


def install() -> None:
    """Wrap `compile_grammar` of both backends. Calling it twice has no further effect."""
    for backend, bounded in (
        (backend_xgrammar.XgrammarBackend, _bounded_xgrammar),
        (backend_guidance.GuidanceBackend, _bounded_guidance),
    ):
        if not hasattr(backend.compile_grammar, "__wrapped__"):
            backend.compile_grammar = bounded(backend.compile_grammar)


def _bound_of(backend: Any) -> int | None:
    config = backend.vllm_config.additional_config
    bound: int | None = config.get(KEY) if isinstance(config, dict) else None
    return bound


def _bounded_xgrammar(compile_grammar: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compile_grammar)
    def bounded(
        self: Any,
        request_type: StructuredOutputOptions,
        grammar_spec: str,
        *rest: Any,
        **keywords: Any,
    ) -> Any:
        compile_schema = self.compiler.compile_json_schema
        bound = _bound_of(self)
        if bound is not None and not isinstance(compile_schema, functools.partial):
            self.compiler.compile_json_schema = functools.partial(
                compile_schema, max_whitespace_cnt=bound
            )
        if bound is not None and request_type == StructuredOutputOptions.STRUCTURAL_TAG:
            tags = json.loads(grammar_spec)
            _bound_schemas(tags, bound)
            grammar_spec = json.dumps(tags)
        return compile_grammar(self, request_type, grammar_spec, *rest, **keywords)

    return bounded


def _bound_schemas(tags: Any, bound: int) -> None:
    """Those of a structural tag: vLLM makes one of strict tools, with JSON among other text."""
    if isinstance(tags, list):
        for each in tags:
            _bound_schemas(each, bound)
    elif isinstance(tags, dict):
        if tags.get("type") == "json_schema" and "json_schema" in tags:
            if tags.get("max_whitespace_cnt") is None:
                tags["max_whitespace_cnt"] = bound
        else:
            _bound_schemas(list(tags.values()), bound)


def _bounded_guidance(compile_grammar: Callable[..., Any]) -> Callable[..., Any]:
    """llguidance repeats its `whitespace_pattern` as often as the model likes, so only separators
    may have white space around them: bounded there, none after an opening or before a closing
    bracket.
    """

    @functools.wraps(compile_grammar)
    def bounded(
        self: Any,
        request_type: StructuredOutputOptions,
        grammar_spec: str,
        *rest: Any,
        **keywords: Any,
    ) -> Any:
        bound = _bound_of(self)
        none_wanted = self.disable_any_whitespace  # which vLLM does by itself
        if bound is not None and not none_wanted and request_type in JSON_KINDS:
            schema: Any = {"type": "object"}
            if request_type == StructuredOutputOptions.JSON:
                schema = json.loads(grammar_spec)
            if isinstance(schema, dict):  # true, which allows anything, is a schema too
                space = rf"[ \t\n\r]{{0,{bound}}}"
                options = {
                    "whitespace_flexible": False,
                    "item_separator": f"{space},{space}",
                    "key_separator": f"{space}:{space}",
                }
                schema["x-guidance"] = {**options, **schema.get("x-guidance", {})}
                request_type, grammar_spec = StructuredOutputOptions.JSON, json.dumps(schema)
        return compile_grammar(self, request_type, grammar_spec, *rest, **keywords)

    return bounded
