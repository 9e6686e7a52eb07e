"""The model's chat format as a FastChat `Conversation`.

FastChat's clients ask a worker for its conversation template and render prompts themselves. A Hugging Face model has
a Jinja chat template instead. It is translated by probing: dialogues of marker words are rendered, the text between
the markers gives the pieces of a `Conversation`, and the result counts only if it renders further dialogues to the
same text as the chat template does.

A `Conversation` cannot say everything: it always writes the system block, and it opens earlier replies exactly as it
opens the one to come. `ChatFormat.normalize` puts both right in the prompts that clients send.

Where the model's template has no place for a system message (Gemma), it goes to the start of the first user turn.
Where the template puts it elsewhere (the last user turn, for some Mistral models), dialogues of several turns with a
system message are rendered a little differently, with a warning at the start.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastchat.conversation import Conversation, SeparatorStyle, conv_templates, get_conv_template

from ipex_vllm.errors import OptionError

logger = logging.getLogger(__name__)

Message = dict[str, str]

# Letters only, so that no template trims or reformats them.
SYSTEM, USER, REPLY, USER_2 = "Qsystemq", "Quserq", "Qreplyq", "Qagainq"
FALLBACK_TEMPLATE = "one_shot"
# The others stand for chat services, which take no prompt.
PROMPT_TEMPLATES = {name for name, template in conv_templates.items() if template.sep_style is not None}


@dataclass(frozen=True)
class ChatFormat:
    """A conversation template in FastChat's JSON form, and how to mend what that form cannot say.

    Attributes:
        conversation: what /worker_get_conv_template answers.
        empty_system: the start of a prompt rendered with an empty system message ...
        no_system: ... and what the model's own template has there.
        reply_start: what the model's own template writes before an earlier reply, where that is not roles[1], which
            stands before the reply to come.
        source: where the template came from, for the log.
    """

    conversation: dict[str, Any]
    empty_system: str = ""
    no_system: str = ""
    reply_start: str = ""
    source: str = ""

    def normalize(self, prompt: str) -> str:
        """Return a client's `prompt` as the model's own template would have written it."""
        if self.empty_system and prompt.startswith(self.empty_system):
            prompt = self.no_system + prompt.removeprefix(self.empty_system)
        if self.reply_start:
            next_reply = self.conversation["roles"][1]
            is_right = re.escape(self.reply_start.removeprefix(next_reply))  # as in a prompt that needs no mending
            keep = rf"(?!\Z|{is_right})" if self.reply_start.startswith(next_reply) else r"(?!\Z)"
            prompt = re.sub(re.escape(next_reply) + keep, lambda _: self.reply_start, prompt)
        return prompt


def choose_chat_format(tokenizer: Any, model_path: str, template_name: str | None) -> ChatFormat:
    """Take the template that was asked for, or else the model's own, or else FastChat's for the model's name.

    Raises OptionError for a name that FastChat does not know.
    """
    if template_name is not None:
        check_template_name(template_name)
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


def check_template_name(name: str) -> None:
    """Raise OptionError for a template that FastChat does not know."""
    if name not in PROMPT_TEMPLATES:
        raise OptionError(f"--conv-template {name}: FastChat knows {', '.join(sorted(PROMPT_TEMPLATES))}")


def match_registry(model_path: str) -> str | None:
    """The longest name in FastChat's registry that the model's own name contains, as whole words."""
    name = model_path.rstrip("/").rsplit("/", 1)[-1].lower()
    matches = (
        known for known in PROMPT_TEMPLATES if re.search(rf"(?<![a-z0-9]){re.escape(known.lower())}(?![a-z0-9])", name)
    )
    return max(matches, key=len, default=None)


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
    """Translate the tokenizer's chat template; None when FastChat cannot render its plain dialogues."""
    rendered = Renderer(tokenizer)
    try:
        chat_format = _probe(rendered)
        is_faithful = all(rendered.agrees(chat_format, dialogue) for dialogue in PLAIN_DIALOGUES)
        is_exact = not rendered.takes_system or all(
            rendered.agrees(chat_format, dialogue) for dialogue in SYSTEM_DIALOGUES
        )
    except ValueError as error:
        logger.warning("The chat template cannot be probed: %s", error)
        return None
    if not is_faithful:
        return None
    if not rendered.takes_system:
        logger.info("The chat template takes no system message: it will open the first user turn")
    elif not is_exact:
        logger.warning("Chats with a system message are rendered a little differently from the model's chat template")
    return chat_format


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
        """Whether a client that uses `chat_format` sends the model what its chat template writes."""
        return chat_format.normalize(render_conversation(chat_format.conversation, dialogue)) == self(dialogue)


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


def _probe(rendered: Renderer) -> ChatFormat:
    """Read the pieces of FastChat's NO_COLON_TWO style off the rendered markers.

    That style writes the system prompt, then role + message + separator, each role with its own separator. Raises
    ValueError for a template that writes something else.
    """
    head, next_reply = _split(rendered(_messages(USER)), USER)
    head_of_two, rest = _split(rendered(_messages(USER, REPLY, USER_2)), USER)
    past_reply, rest = _split(rest, REPLY)
    next_turn, second_reply = _split(rest, USER_2)
    if head != head_of_two or next_reply != second_reply:
        raise ValueError("its turns are not written alike")
    system_head = f"{head}{SYSTEM}\n\n"
    if rendered.takes_system:
        system_head, _ = _split(rendered(_messages(USER, system=SYSTEM)), USER)

    # What follows a reply closes it; what is left before the next message is the user's role, if all turns open so.
    _, reply_end = _split(rendered(_messages(USER, REPLY), add_generation_prompt=False), REPLY)
    user_start = next_turn.removeprefix(reply_end)
    if not (head.endswith(user_start) and system_head.endswith(user_start)):
        user_start = ""
    system = _system_block(head.removesuffix(user_start), system_head.removesuffix(user_start))
    # What a generation prompt adds is the assistant's role, and what is left closes the user's turn. Where it adds
    # nothing of its own, all that stands between the two messages is the role.
    assistant_start = rendered(_messages(USER)).removeprefix(rendered(_messages(USER), add_generation_prompt=False))
    user_end = next_reply.removesuffix(assistant_start)
    if not assistant_start or not next_reply.endswith(assistant_start) or not past_reply.startswith(user_end):
        assistant_start, user_end = next_reply, ""
    reply_start = past_reply.removeprefix(user_end)
    return ChatFormat(
        {
            "name": "chat_template",
            "system_template": system.template,
            "system_message": system.default_message,
            "roles": [user_start, assistant_start],
            "messages": [],
            "offset": 0,
            "sep_style": int(SeparatorStyle.NO_COLON_TWO),
            "sep": user_end,
            "sep2": next_turn.removesuffix(user_start),
            "stop_str": None,
            "stop_token_ids": _stop_token_ids(rendered.tokenizer, next_turn),
        },
        empty_system=system.empty,
        no_system=system.absent,
        reply_start=reply_start if reply_start != assistant_start else "",
        source="the model's chat template",
    )


def _stop_token_ids(tokenizer: Any, next_turn: str) -> list[int]:
    """EOS, and the special token that ends a reply, which is another one in some families (Gemma, Phi-3)."""
    special = set(tokenizer.all_special_ids)
    behind_reply = tokenizer(next_turn, add_special_tokens=False)["input_ids"]
    end_of_turn = next((token_id for token_id in behind_reply if token_id in special), None)
    return sorted({token_id for token_id in (tokenizer.eos_token_id, end_of_turn) if token_id is not None})


@dataclass(frozen=True)
class _SystemBlock:
    """FastChat's template and default, and what to write in place of the template filled with an empty message."""

    template: str
    default_message: str = ""
    empty: str = ""
    absent: str = ""


def _system_block(without: str, with_marker: str) -> _SystemBlock:
    """How a system message is written, given the start of a prompt without one and with one."""
    before, after = _split(with_marker, SYSTEM)
    template = f"{_escape(before)}{{system_message}}{_escape(after)}"
    default = re.fullmatch(f"{re.escape(before)}(.*){re.escape(after)}", without, re.DOTALL)
    if default:
        return _SystemBlock(template, default_message=default[1])
    return _SystemBlock(template, empty=before + after, absent=without)


def _escape(text: str) -> str:
    """`text` so that str.format, which FastChat fills the template with, gives it back."""
    return text.replace("{", "{{").replace("}", "}}")


def _split(text: str, marker: str) -> tuple[str, str]:
    before, found, after = text.partition(marker)
    if not found:
        raise ValueError("a message is missing from the rendered text")
    return before, after
