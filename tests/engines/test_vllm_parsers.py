"""Which of vLLM's parsers is chosen for a model, by snippets of the families' own chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.engines.vllm_parsers import REASONING, TOOLS, Parsers, choose_parsers

HERMES = """For each function call, return a json object within <tool_call></tool_call> XML tags:\\n<tool_call>\\n
{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>"""
THINKING = "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
CODER = "<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>"
DEEPSEEK = "<\uff5ctool\u2581calls\u2581begin\uff5c>"


@pytest.mark.parametrize(
    ("model_type", "template", "tools", "reasoning"),
    [
        ("qwen2", HERMES, "hermes", None),
        ("qwen3", HERMES + THINKING, "hermes", "qwen3"),
        ("qwen3", HERMES, "hermes", None),  # of 2507: it never thinks
        ("qwen3_moe", CODER, "qwen3_coder", None),
        ("qwen2_5_vl", "{% for message in messages %}", None, None),
        ("llama", "Environment: ipython ... 'parameters': dictionary of argument name", "llama3_json", None),
        ("mistral", "[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral", None),
        ("deepseek_v3", DEEPSEEK + "```json", "deepseek_v3", None),
        ("gpt_oss", "<|start|>system<|message|>", "openai", "openai_gptoss"),
        ("glm4_moe", "<tool_call>{function-name}<arg_key>" + THINKING, "glm45", "glm45"),
        ("granitemoehybrid", HERMES, "granite4", None),
        ("phi3", "<|tool|>' + tool + '<|/tool|>", "phi4_mini_json", None),
        ("llama", "<|im_start|>", None, None),
    ],
)
def test_a_family_is_known_by_its_template(
    model_type: str, template: str, tools: str | None, reasoning: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert choose_parsers(str(tmp_path)) == Parsers(tools, reasoning)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text(template)
    assert choose_parsers(str(tmp_path)) == Parsers(tools, reasoning)


def test_a_model_without_tools_or_not_here_has_none() -> None:
    for model in (str(MODEL_DIR), "someone/elsewhere"):
        assert choose_parsers(model) == Parsers()
    assert "where tool_choice forces it" in str(Parsers())


def test_vllm_has_every_parser_that_is_chosen() -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    assert {family.parser for family in TOOLS} <= set(ToolParserManager.list_registered())
    assert {family.parser for family in REASONING} <= set(ReasoningParserManager.list_registered())
