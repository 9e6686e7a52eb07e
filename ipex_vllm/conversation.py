"""The model's chat format as a FastChat `Conversation`.

FastChat's clients ask a worker for its conversation template and render prompts themselves. A Hugging Face model has
a Jinja chat template instead. It is translated by probing: dialogues of marker words are rendered, the text between
the markers gives the pieces of a `Conversation`, and the result counts only if it renders further dialogues to the
same tokens as the chat template does.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastchat.conversation import Conversation, SeparatorStyle, conv_templates, get_conv_template

from ipex_vllm.engine import EngineError

logger = logging.getLogger(__name__)

Message = dict[str, str]

# Letters only, so that no template trims or reformats them.
SYSTEM, USER, REPLY, USER_2 = "Qsystemq", "Quserq", "Qreplyq", "Qagainq"
FALLBACK_TEMPLATE = "one_shot"


@dataclass(frozen=True)
class ChatFormat:
    """A conversation template in FastChat's JSON form, and how to mend what that form cannot say.

    Attributes:
        conversation: what /worker_get_conv_template answers.
        empty_system: the start of a prompt rendered with an empty system message ...
        no_system: ... and what the model's own template has there. FastChat's form always writes the system block.
        source: where the template came from, for the log.
    """

    conversation: dict[str, Any]
    empty_system: str = ""
    no_system: str = ""
    source: str = ""

    def normalize(self, prompt: str) -> str:
        """Return `prompt` without an empty system block, which the model has never seen."""
        if self.empty_system and prompt.startswith(self.empty_system):
            return self.no_system + prompt.removeprefix(self.empty_system)
        return prompt


def choose_chat_format(tokenizer: Any, model_path: str, template_name: str | None) -> ChatFormat:
    """Take the template that was asked for, or else the model's own, or else FastChat's for the model's name.

    Raises EngineError for a name that FastChat does not know.
    """
    if template_name is not None:
        if template_name not in conv_templates:
            raise EngineError(f"--conv-template {template_name}: FastChat knows {', '.join(sorted(conv_templates))}")
        return ChatFormat(as_json(get_conv_template(template_name)), source="--conv-template")
    if getattr(tokenizer, "chat_template", None):
        chat_format = translate(tokenizer)
        if chat_format is not None:
            return chat_format
        logger.warning("The model's chat template fits no FastChat conversation style")
    known = match_registry(model_path)
    if known is not None:
        return ChatFormat(
            as_json(get_conv_template(known)), source=f"FastChat's template {known!r}, by the model's name"
        )
    logger.warning(
        "No conversation template is known for this model: chats will use FastChat's %r, which it was not trained on. "
        "Choose one with --conv-template.",
        FALLBACK_TEMPLATE,
    )
    return ChatFormat(as_json(get_conv_template(FALLBACK_TEMPLATE)), source="nothing better known")


def match_registry(model_path: str) -> str | None:
    """The longest name in FastChat's registry that the model's own name contains."""
    name = model_path.rstrip("/").rsplit("/", 1)[-1].lower()
    return max((known for known in conv_templates if known.lower() in name), key=len, default=None)


def as_json(conversation: Conversation) -> dict[str, Any]:
    """All fields that FastChat's API server reads; its own `dict()` leaves most of them out."""
    return {
        "name": conversation.name,
        "system_template": conversation.system_template,
        "system_message": conversation.system_message,
        "roles": list(conversation.roles),
        "messages": [list(message) for message in conversation.messages],
        "offset": conversation.offset,
        "sep_style": int(conversation.sep_style),
        "sep": conversation.sep,
        "sep2": conversation.sep2,
        "stop_str": conversation.stop_str,
        "stop_token_ids": conversation.stop_token_ids,
    }


def translate(tokenizer: Any) -> ChatFormat | None:
    """Translate the tokenizer's chat template; None when no FastChat style renders its plain dialogues."""
    rendered = Renderer(tokenizer)
    try:
        candidates = list(_candidates(rendered))
    except ValueError as error:
        logger.warning("The chat template cannot be probed: %s", error)
        return None
    best: ChatFormat | None = None
    for candidate in candidates:
        if not all(rendered.agrees(candidate, dialogue) for dialogue in PLAIN_DIALOGUES):
            continue
        if not rendered.takes_system or all(rendered.agrees(candidate, dialogue) for dialogue in SYSTEM_DIALOGUES):
            return candidate
        best = best or candidate
    if best is not None:
        logger.warning("Chats with a system message are rendered a little differently from the model's chat template")
    return best


def _messages(*contents: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant")
    dialogue = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return dialogue if system is None else [{"role": "system", "content": system}, *dialogue]


PLAIN_DIALOGUES = (
    _messages("Hello."),
    _messages("What is 2 + 2?", "4.", "And times 3?"),
    _messages("Line one\nline two", "A {curly} answer", "Why?", "Because.", "I see"),
)
SYSTEM_DIALOGUES = tuple(
    [{"role": "system", "content": "Answer in {one} word."}, *dialogue] for dialogue in PLAIN_DIALOGUES
)


@dataclass
class Renderer:
    """Renders dialogues both ways."""

    tokenizer: Any
    takes_system: bool = field(init=False)

    def __post_init__(self) -> None:
        try:
            self.takes_system = SYSTEM in self(_messages(USER, system=SYSTEM))
        except ValueError:  # some templates refuse the role
            self.takes_system = False

    def __call__(self, dialogue: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The chat template's text. Raises ValueError where the template does."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(dialogue), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # Jinja's own errors, and whatever a template's raise_exception is made of
            raise ValueError(str(error)) from error
        return text

    def agrees(self, chat_format: ChatFormat, dialogue: Sequence[Message]) -> bool:
        """Whether a client that uses `chat_format` sends the model the same tokens as its chat template gives."""
        ours = chat_format.normalize(render_conversation(chat_format.conversation, dialogue))
        return self._tokens(ours) == self._tokens(self(dialogue))

    def _tokens(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token
        spells_bos = bool(bos) and text.startswith(bos)
        token_ids: list[int] = self.tokenizer(text, add_special_tokens=not spells_bos)["input_ids"]
        return token_ids


def render_conversation(conversation: dict[str, Any], dialogue: Sequence[Message]) -> str:
    """Render as FastChat's API server does."""
    copy = Conversation(**{**conversation, "sep_style": SeparatorStyle(conversation["sep_style"]), "messages": []})
    for message in dialogue:
        if message["role"] == "system":
            copy.set_system_message(message["content"])
        else:
            copy.append_message(copy.roles[message["role"] == "assistant"], message["content"])
    copy.append_message(copy.roles[1], None)
    prompt: str = copy.get_prompt()
    return prompt


def _candidates(rendered: Renderer) -> Iterator[ChatFormat]:
    """Yield possible translations, the plainest first. Raises ValueError for a template without the expected order."""
    head, first_reply, _ = _split(rendered(_messages(USER)), USER, None)
    between_head, reply_start, next_turn, second_reply = _split_turns(rendered(_messages(USER, REPLY, USER_2)))
    if (head, first_reply) != (between_head, reply_start) or reply_start != second_reply:
        raise ValueError("turns are not written alike")
    without_prompt = rendered(_messages(USER), add_generation_prompt=False)
    user_start = _common_suffix(head, next_turn)
    system_head = _split(rendered(_messages(USER, system=SYSTEM)), USER, None)[0] if rendered.takes_system else None
    stop_token_ids = [rendered.tokenizer.eos_token_id] if rendered.tokenizer.eos_token_id is not None else []
    common: dict[str, Any] = {"name": "chat_template", "offset": 0, "messages": [], "stop_str": None}
    common["stop_token_ids"] = stop_token_ids

    # FastChat's NO_COLON_TWO: system prompt, then role + message + separator; each role has its own separator.
    assistant_start = rendered(_messages(USER)).removeprefix(without_prompt)
    if not assistant_start or not reply_start.endswith(assistant_start):
        assistant_start = reply_start
    prefix = head.removesuffix(user_start)
    system = _system_block(prefix, system_head, user_start)
    yield ChatFormat(
        {
            **common,
            "system_template": system.template,
            "system_message": system.default_message,
            "roles": [user_start, assistant_start],
            "sep_style": int(SeparatorStyle.NO_COLON_TWO),
            "sep": reply_start.removesuffix(assistant_start),
            "sep2": next_turn.removesuffix(user_start),
        },
        empty_system=system.empty,
        no_system=prefix if system.empty else "",
        source="the model's chat template",
    )

    # FastChat's LLAMA2: the system message stands inside the first user turn, and "[INST]" opens it without one.
    bos = rendered.tokenizer.bos_token or ""
    opening, closing = "[INST]", "[/INST]"
    if head.removeprefix(bos).strip() == opening and reply_start.strip() == closing:
        yield ChatFormat(
            {
                **common,
                "system_template": _as_template((system_head or f"{opening} {SYSTEM}\n\n").removeprefix(bos)),
                "system_message": "",
                "roles": [opening, closing],
                "sep_style": int(SeparatorStyle.LLAMA2),
                "sep": " ",
                "sep2": next_turn.rstrip().removesuffix(opening),
            },
            source="the model's chat template",
        )


@dataclass(frozen=True)
class _SystemBlock:
    template: str
    default_message: str
    empty: str


def _system_block(prefix: str, system_head: str | None, user_start: str) -> _SystemBlock:
    """How a system message is written, given what stands before the first user turn without one (`prefix`) and with."""
    if system_head is None or not system_head.endswith(user_start):
        # No place for it: a client's system message goes in front as it is.
        return _SystemBlock(prefix.replace("{", "{{").replace("}", "}}") + "{system_message}", "", "")
    block = system_head.removesuffix(user_start)
    before, after = block.split(SYSTEM)
    default = re.fullmatch(f"{re.escape(before)}(.*){re.escape(after)}", prefix, re.DOTALL)
    if default:
        return _SystemBlock(_as_template(block), default[1], "")
    return _SystemBlock(_as_template(block), "", before + after)


def _as_template(block: str) -> str:
    return block.replace("{", "{{").replace("}", "}}").replace(SYSTEM, "{system_message}")


def _split(text: str, first: str, second: str | None) -> tuple[str, str, str]:
    """Cut `text` at its markers into what is before, between and after them. Raises ValueError."""
    before, found, rest = text.partition(first)
    between, found_second, after = rest.partition(second) if second else (rest, "", "")
    if not found or (second and not found_second):
        raise ValueError("a message is missing from the rendered text")
    return before, between, after


def _split_turns(text: str) -> tuple[str, str, str, str]:
    head, reply_start, rest = _split(text, USER, REPLY)
    next_turn, second_reply, _ = _split(rest, USER_2, None)
    return head, reply_start, next_turn, second_reply


def _common_suffix(first: str, second: str) -> str:
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return first[len(first) - length :]
