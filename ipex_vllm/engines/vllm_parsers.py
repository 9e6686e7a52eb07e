"""Which of vLLM's parsers reads the tool calls and the reasoning of a model: its chat template shows its syntax."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Parsers:
    """vLLM's names of them; None where the template shows no syntax that a parser reads."""

    tools: str | None = None
    reasoning: str | None = None

    def __str__(self) -> str:
        tools = self.tools or "none, so tools are called where tool_choice forces it"
        return f"tools: {tools}; reasoning: {self.reasoning or 'none'} (by the model's chat template)"


@dataclass(frozen=True)
class Family:
    """A syntax and its parser. All of `marks` are in the template; `types` are the model types it is known of."""

    parser: str
    marks: tuple[str, ...] = ()
    types: tuple[str, ...] = ()

    def matches(self, model_type: str, template: str) -> bool:
        of_type = not self.types or model_type.startswith(self.types)
        return of_type and all(mark in template for mark in self.marks)


# The first that matches is taken: what is special comes before what is common. DeepSeek's marks are of full-width
# bars and blocks.
TOOLS = (
    Family("openai", types=("gpt_oss",)),
    Family("granite4", ("<tool_call>",), ("granitemoehybrid",)),
    Family("granite", ("<|tool_call|>",), ("granite",)),
    Family("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    Family("glm45", ("<tool_call>", "<arg_key>")),
    Family("hermes", ("<tool_call>", "name", "arguments")),
    Family("deepseek_v31", ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581sep\uff5c>{")),
    Family("deepseek_v3", ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "```json")),
    Family("kimi_k2", ("<|tool_calls_section_begin|>",)),
    Family("minimax_m2", ("<minimax:tool_call>",)),
    Family("mistral", ("[TOOL_CALLS]",)),
    Family("llama4_pythonic", ("<|python_start|>",), ("llama4",)),
    Family("llama3_json", ("<|python_tag|>",)),
    Family("llama3_json", ("ipython", "parameters"), ("llama",)),
    Family("phi4_mini_json", ("<|tool|>",), ("phi",)),
    Family("gemma4", ("<|tool_call>",), ("gemma4",)),
    Family("functiongemma", ("<start_function_call>",)),
    Family("lfm2", ("<|tool_list_start|>",), ("lfm2",)),
)

# Only of models whose template turns thinking on: one that never thinks has all of its answer taken for a thought.
REASONING = (
    Family("openai_gptoss", types=("gpt_oss",)),
    Family("glm45", ("enable_thinking", "<think>"), ("glm4",)),
    Family("qwen3", ("enable_thinking", "<think>"), ("qwen3",)),
    Family("deepseek_r1", ("<\uff5cAssistant\uff5c><think>\\n",)),
    Family("minimax_m2", ("<minimax:tool_call>", "<think>")),
    Family("gemma4", ("enable_thinking", "<|channel>"), ("gemma4",)),
)


def choose_parsers(model_path: str) -> Parsers:
    """The parsers for a model directory; none for a model that is not here yet."""
    folder = Path(model_path)
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type", "")
        template = read_template(folder)
    except (OSError, ValueError):
        return Parsers()
    return Parsers(_first(TOOLS, model_type, template), _first(REASONING, model_type, template))


def register_forced_calls() -> str:
    """Give vLLM a parser for models whose template shows no tools; its name.

    A call that is forced is made by a grammar, for any model, and vLLM asks for a parser all the same, which it makes
    only where "auto" is allowed: so that is refused here, since such a model is not told of its tools.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.tool_parsers import ToolParserManager

    name = "ipex_vllm_forced"
    hermes: Any = ToolParserManager.get_tool_parser("hermes")

    class ForcedCalls(hermes):  # type: ignore[misc]
        def adjust_request(self, request: Any) -> Any:
            if request.tools and request.tool_choice == "auto":
                raise VLLMValidationError(
                    "The model's chat template shows it no tools, so it cannot choose one: force a call with "
                    'tool_choice "required" or a function\'s name, or start the worker with --enable-auto-tool-choice '
                    "and --tool-call-parser.",
                    parameter="tool_choice",
                )
            return super().adjust_request(request)

    ToolParserManager.register_module(name, force=True, module=ForcedCalls)
    return name


def read_template(folder: Path) -> str:
    """All chat templates of a model directory, as one text; empty where there is none."""
    alone = folder / "chat_template.jinja"
    if alone.exists():
        return alone.read_text(encoding="utf-8")
    templates: list[Any] = []
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).exists():
            templates.append(json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template"))
    return "\n".join(template if isinstance(template, str) else json.dumps(template) for template in templates)


def _first(families: tuple[Family, ...], model_type: str, template: str) -> str | None:
    return next((family.parser for family in families if family.matches(model_type, template)), None)
