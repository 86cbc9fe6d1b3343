from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from packhorse.serve.engines.vllm import plugin
from packhorse.serve.engines.vllm.patches import json_whitespace
from tests.conftest import DEMO

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
pytestmark = pytest.mark.filterwarnings(
    "ignore:max_rollback_tokens is deprecated:DeprecationWarning"  # vLLM's call
)
BACKENDS = [XgrammarBackend, GuidanceBackend]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(DEMO / "model"))


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vLLM's processes, for one test."""
    for backend in BACKENDS:
        monkeypatch.setattr(backend, "compile_grammar", backend.compile_grammar)
    plugin.register()
    plugin.register()


def takes(
    backend: Any,
    tokenizer: Any,
    text: str,
    *,
    bound: int | None = 3,
    kind: StructuredOutputOptions = StructuredOutputOptions.JSON,
    grammar: str = SCHEMA,
) -> bool:
    """Whether a model could write the whole text."""
    config = SimpleNamespace(
        structured_outputs_config=SimpleNamespace(
            disable_any_whitespace=False, disable_additional_properties=False
        ),
        model_config=None,
        speculative_config=None,
        additional_config={} if bound is None else {json_whitespace.KEY: bound},
    )
    made = backend(config, tokenizer=tokenizer, vocab_size=len(tokenizer))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    compiled = made.compile_grammar(kind, grammar, stop_token_ids=None)  # as vLLM calls it
    return len(compiled.validate_tokens(tokens)) == len(tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_white_space_between_parts_is_bounded(backend: Any, tokenizer: Any) -> None:
    for count, expected in ((0, True), (1, True), (3, True), (4, False), (40, False)):
        space = " " * count
        assert takes(backend, tokenizer, f'{{"a":{space}1, "b": true}}') is expected
        assert takes(backend, tokenizer, f'{{"a": 1{space},"b": true}}') is expected
        assert takes(backend, tokenizer, f'{{"a": 1,{space}"b": true}}') is expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", ['{%s"a": 1, "b": true}', '{"a": 1, "b": true%s}'])
def test_it_is_bounded_inside_brackets_too(backend: Any, tokenizer: Any, text: str) -> None:
    assert not takes(backend, tokenizer, text % (" " * 40))
    assert takes(XgrammarBackend, tokenizer, text % "\n  ")


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_object_is_bounded_as_well(backend: Any, tokenizer: Any) -> None:
    kind = StructuredOutputOptions.JSON_OBJECT
    assert takes(backend, tokenizer, '{"x": [1, 2]}', kind=kind)
    assert not takes(backend, tokenizer, '{"x":' + " " * 40 + "1}", kind=kind)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_bound_the_grammar_is_vllms(backend: Any, tokenizer: Any) -> None:
    assert takes(backend, tokenizer, '{"a":' + " " * 40 + '1, "b": true}', bound=None)


def test_calls_of_strict_tools_are_bounded(tokenizer: Any) -> None:
    """vLLM makes a structural tag of them, which has the schema inside."""
    schema = json.loads(SCHEMA)
    content = {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": None}
    call = {"type": "tag", "begin": "<tool_call>", "content": content, "end": "</tool_call>"}
    tags = {"type": "structural_tag", "format": {"type": "sequence", "elements": [call]}}
    kind = StructuredOutputOptions.STRUCTURAL_TAG
    for count, expected in ((0, True), (3, True), (4, False), (40, False)):
        text = f'<tool_call>{{"a":{" " * count}1, "b": true}}</tool_call>'
        assert (
            takes(XgrammarBackend, tokenizer, text, kind=kind, grammar=json.dumps(tags)) is expected
        ), count
    text = text.replace(" " * 40, " " * 400)
    unbounded = {"bound": None, "kind": kind, "grammar": json.dumps(tags)}
    assert takes(XgrammarBackend, tokenizer, text, **unbounded)  # type: ignore[arg-type]
