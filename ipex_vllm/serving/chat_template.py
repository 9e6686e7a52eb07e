"""A model's own chat template: which prompt a dialogue becomes, and which tokens end the answer to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ipex_vllm.engines.stop_tokens import added_tokens, special_tokens

Message = dict[str, str]

# Letters only, so that no template trims or reformats them.
SYSTEM, USER, REPLY, USER_2 = "Qsystemq", "Quserq", "Qreplyq", "Qagainq"
QUESTION: list[Message] = [{"role": "user", "content": USER}]
WITH_SYSTEM = [{"role": "system", "content": SYSTEM}, *QUESTION]
TWO_TURNS = [*QUESTION, {"role": "assistant", "content": REPLY}, {"role": "user", "content": USER_2}]
MANY_TURNS = [*WITH_SYSTEM, *TWO_TURNS[1:] * 20]

# What a template is tried with before it is trusted: what is rendered here, and a long dialogue.
TRIALS = (QUESTION, [{"role": "system", "content": ""}, *QUESTION], WITH_SYSTEM, TWO_TURNS, MANY_TURNS)


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template.

    Attributes:
        takes_parts: it wants a message's content as a list of parts, as some multimodal models' do, not as text.
        takes_system: it has a place for a system message.
        has_default_system: it writes one of its own where a dialogue has none.
    """

    tokenizer: Any
    takes_parts: bool = False
    takes_system: bool = True
    has_default_system: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """Raises ValueError, which says what is wrong, for a template that does not write what a user says."""
        template = cls(tokenizer)
        try:
            alone = template.render(QUESTION)
        except ValueError:
            alone = ""
        if USER not in alone:
            template = cls(tokenizer, takes_parts=True)
            alone = template.render(QUESTION)
        if USER not in alone:
            raise ValueError("it leaves out what the user says")
        try:
            takes_system = SYSTEM in template.render(WITH_SYSTEM)
            empty = template.render([{"role": "system", "content": ""}, *QUESTION])
        except ValueError:  # some templates refuse the role
            return replace(template, takes_system=False)
        return replace(template, takes_system=takes_system, has_default_system=takes_system and len(alone) > len(empty))

    def prompt(self, dialogue: Sequence[Message]) -> str:
        """The prompt that asks for the next reply of a dialogue; its system message, if any, comes first.

        An empty system message counts as none, but where it takes the place of the template's own. Raises ValueError
        for what the template refuses.
        """
        system = dialogue[0]["content"] if dialogue and dialogue[0]["role"] == "system" else None
        if system is None:
            return self.render(dialogue)
        turns = list(dialogue[1:])
        if not system and not self.has_default_system:
            return self.render(turns)
        if self.takes_system:
            return self.render(dialogue)
        if turns and turns[0]["role"] == "user":
            turns[0] = {"role": "user", "content": f"{system}\n\n{turns[0]['content']}"}
        else:
            turns.insert(0, {"role": "user", "content": system})
        return self.render(turns)

    def render(self, dialogue: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """What the template makes of a dialogue as it is. Raises ValueError where the template does."""
        messages: list[dict[str, Any]] = list(dialogue)
        if self.takes_parts:
            messages = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in dialogue]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # Jinja's own errors, and whatever a template's raise_exception is made of
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
        return text

    def end_tokens(self, generation_eos: Iterable[int]) -> list[int]:
        """The ids of the tokens that end an answer, in order.

        They are the tokenizer's `eos_token`, the model's `generation_eos` (`eos_token_id` of its generation
        configuration), and the added token that the template writes behind a reply: Gemma's, Phi's and many a
        fine-tuned model's, whatever the other two say. Where the template opens a reply with special tokens that the
        model has to write itself (gpt-oss' channels), the token behind it closes a part of the answer, and is not one.
        """
        ends = {self.tokenizer.eos_token_id, *generation_eos} - {None}
        try:
            prompt, dialogue = self.render(QUESTION), self.render(TWO_TURNS)
        except ValueError:
            return sorted(ends)
        next_opening = prompt.partition(USER)[2]
        past_opening, _, behind = dialogue.partition(USER)[2].partition(REPLY)
        tokens = added_tokens(self.tokenizer)
        found = re.search("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))), behind) if tokens else None
        own_opening = past_opening.removeprefix(next_opening) if past_opening.startswith(next_opening) else ""
        has_parts = any(token in own_opening for token in special_tokens(self.tokenizer))
        if found is not None and not has_parts:
            ends.add(tokens[found[0]])
        return sorted(ends)
