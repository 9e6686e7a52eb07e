"""What structured output by xgrammar lets into strings: what JSON does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xgrammar

from ipex_vllm.low_bit.vllm.json_strings import Compiler

NUM_BYTES = 256
BOUNDED = {
    "type": "object",
    "properties": {"a": {"type": "string", "minLength": 1, "maxLength": 3}, "b": {"type": "string"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TAG = {"type": "tag", "begin": "<call>", "content": {"type": "json_schema", "json_schema": BOUNDED}, "end": "</call>"}
GOOD = ['{"a": "é😀x", "b": "\\n"}', '{"a": "]", "b": ""}']
# Too short, too long, and characters that JSON has as escapes alone.
WRONG = ['{"a": "", "b": ""}', '{"a": "abcd", "b": ""}', '{"a": "\t", "b": ""}', '{"a": "\x01", "b": ""}']


@pytest.fixture(scope="module")
def compiler() -> xgrammar.GrammarCompiler:
    """For a vocabulary of single bytes."""
    vocabulary = [bytes([value]) for value in range(NUM_BYTES)] + [b"</s>"]
    raw = xgrammar.VocabType.RAW
    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(vocabulary, raw, stop_token_ids=[NUM_BYTES]))


def accepts(compiled: Any, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
    return bool(matcher.accept_string(text) and matcher.is_terminated())


def test_a_bounded_string_is_json(compiler: xgrammar.GrammarCompiler) -> None:
    mended = Compiler(compiler)
    schema = mended.compile_json_schema(json.dumps(BOUNDED), any_whitespace=False)
    tag = mended.compile_structural_tag(json.dumps({"type": "structural_tag", "format": TAG}))
    for text in GOOD:
        assert json.loads(text)
        assert accepts(schema, text)
        assert accepts(tag, f"<call>{text}</call>")
    for text in WRONG:
        assert not accepts(schema, text)
        assert not accepts(tag, f"<call>{text}</call>")


def test_xgrammar_still_lets_control_characters_into_it(compiler: xgrammar.GrammarCompiler) -> None:
    """Where this fails, `json_strings` is no longer needed."""
    assert accepts(compiler.compile_json_schema(json.dumps(BOUNDED), any_whitespace=False), WRONG[2])
