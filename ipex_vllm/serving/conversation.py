"""The model's chat format, for FastChat's clients.

FastChat's clients ask a worker for its conversation template and render prompts themselves; a Hugging Face model has a
Jinja chat template instead, which can trim, leave thoughts out of earlier replies, or write the last turn otherwise: no
`Conversation` can say that. So the `Conversation` of a model with a template of its own is a notation: it writes each
message between control characters, and the worker reads the dialogue back from such a prompt and lets the model's
template render it. A prompt that is not in the notation is taken as it is.

What FastChat's protocol carries is texts of users and replies, and one system message. Where the model's template has
no place for that one (Gemma 2), it opens the first user turn.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastchat.conversation import Conversation, SeparatorStyle, conv_templates, get_conv_template

from ipex_vllm.engines.generation import InvalidParameter
from ipex_vllm.errors import EngineError, OptionError
from ipex_vllm.serving import template_trial
from ipex_vllm.serving.chat_template import TRIALS, ChatTemplate, Message

logger = logging.getLogger(__name__)

FALLBACK_TEMPLATE = "one_shot"
# The others stand for chat services, which take no prompt.
PROMPT_TEMPLATES = {name for name, template in conv_templates.items() if template.sep_style is not None}

# The notation. FastChat writes role + message + CLOSE, and the role alone for an empty message.
OPEN, ROLE_END, CLOSE, NO_SYSTEM = "\x1d", "\x1f", "\x1e", "\x1a"
SYSTEM_START, USER_START, REPLY_START = (f"{OPEN}{role}{ROLE_END}" for role in ("system", "user", "assistant"))
MESSAGE_START = re.compile(f"{OPEN}(system|user|assistant){ROLE_END}")
NOTATION = Conversation(
    name="chat_template",
    system_template=f"{SYSTEM_START}{{system_message}}{CLOSE}",
    system_message=NO_SYSTEM,
    roles=(USER_START, REPLY_START),
    sep_style=SeparatorStyle.NO_COLON_SINGLE,
    sep=CLOSE,
)


@dataclass(frozen=True)
class ChatFormat:
    """A conversation template in FastChat's JSON form, and what turns its prompts into the model's.

    Attributes:
        conversation: what /worker_get_conv_template answers.
        template: the model's own, where `conversation` is the notation.
        source: where the template came from, for the log.
    """

    conversation: dict[str, Any]
    template: ChatTemplate | None = None
    source: str = ""

    def normalize(self, prompt: str) -> str:
        """Return a client's `prompt` as the model's own template writes it. Raises InvalidParameter if that refuses."""
        if self.template is None or not MESSAGE_START.match(prompt):
            return prompt
        try:
            return self.template.prompt(read_dialogue(prompt))
        except ValueError as error:
            raise InvalidParameter(f"The model's chat template refuses this dialogue: {str(error)[:200]}") from error


def read_dialogue(prompt: str) -> list[Message]:
    """The dialogue that a prompt in the notation holds, without the reply to come."""
    pieces = MESSAGE_START.split(prompt)[1:]
    messages = [
        {"role": role, "content": content.removesuffix(CLOSE)}
        for role, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return [message for message in messages if message != {"role": "system", "content": NO_SYSTEM}]


def choose_chat_format(tokenizer: Any, model_path: str, template_name: str | None) -> ChatFormat:
    """Take the template that was asked for, or else the model's own, or else FastChat's for the model's name.

    Raises OptionError for a name that FastChat does not know, and EngineError for a template of the model's that does
    not end, whether or not it would be taken: other protocols render it too.
    """
    own_template = getattr(tokenizer, "chat_template", None)
    if own_template:
        check_ends(own_template, tokenizer.special_tokens_map)
    if template_name is not None:
        check_template_name(template_name)
        return ChatFormat(as_json(get_conv_template(template_name)), source="--conv-template")
    if own_template:
        try:
            return own_format(tokenizer, model_path)
        except ValueError as error:
            logger.warning("The model's chat template cannot be used: %s", error)
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


def check_ends(template: str | dict[str, str], special_tokens: Mapping[str, Any]) -> None:
    """Raise EngineError for a chat template, or one of several by name, that does not end."""
    for each in template.values() if isinstance(template, dict) else (template,):
        if not template_trial.ends(each, special_tokens, TRIALS):
            raise EngineError(
                f"the model's chat template did not end within {template_trial.CPU_LIMIT_S} s of processor time and "
                f"{template_trial.MEMORY_LIMIT_BYTES >> 20} MiB for a short dialogue: mend it, or take it out of the "
                "model's directory (chat_template.jinja, or chat_template in tokenizer_config.json)"
            )


def own_format(tokenizer: Any, model_path: str = "") -> ChatFormat:
    """The format of a tokenizer's own chat template. Raises ValueError, which says what is wrong with the template."""
    template = ChatTemplate.of(tokenizer)
    conversation = as_json(NOTATION)
    conversation["stop_token_ids"] = template.end_tokens(generation_eos(model_path))
    system = "one system message" if template.takes_system else "one system message, which opens the first user turn"
    return ChatFormat(
        conversation,
        template,
        f"the model's chat template renders every dialogue; FastChat carries texts and {system}, OpenAI's /v1 the rest",
    )


def generation_eos(model_path: str) -> list[int]:
    """The tokens that end a text by a model directory's generation configuration."""
    try:
        found = json.loads((Path(model_path) / "generation_config.json").read_text())["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [token_id for token_id in (found if isinstance(found, list) else [found]) if type(token_id) is int]


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
