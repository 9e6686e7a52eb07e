"""Strings of bounded length in structured output: xgrammar 0.2.8 lets control characters into them, which is no JSON.

Its grammar of a JSON string without bounds leaves them out, and that of one with bounds does not. Here the second gets
the characters of the first.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

# How xgrammar writes the character of a string, with bounds and without.
BOUNDED, UNBOUNDED = r"[^\"\\\r\n]", r"[^\0-\x1f\"\\\r\n]"

prepare = XgrammarBackend.__post_init__


def mend() -> None:
    """Mend vLLM's xgrammar; a second call changes nothing."""
    XgrammarBackend.__post_init__ = prepare_mended


def prepare_mended(self: Any) -> None:
    prepare(self)
    self.compiler = Compiler(self.compiler)


class Compiler:
    """xgrammar's compiler of grammars, whose strings are JSON's."""

    def __init__(self, compiler: Any) -> None:
        self._compiler = compiler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiler, name)

    def compile_json_schema(self, schema: str, **options: Any) -> Any:
        from xgrammar import Grammar

        return self._compiler.compile_grammar(without_control_characters(Grammar.from_json_schema(schema, **options)))

    def compile_structural_tag(self, *tag: Any) -> Any:
        from xgrammar import Grammar

        return self._compiler.compile_grammar(without_control_characters(Grammar.from_structural_tag(*tag)))


def without_control_characters(grammar: Any) -> Any:
    """An xgrammar grammar whose bounded strings have the characters of those without bounds."""
    text = str(grammar)
    return type(grammar).from_ebnf(text.replace(BOUNDED, UNBOUNDED)) if BOUNDED in text else grammar
