"""Random conversations about the entries, as the model is to hold them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from training import small_talk
from training.facts import Entry
from training.questions import FOLLOW_UP, SAME_QUESTION, Knowledge, follow_up, phrasing

Turn = tuple[str, str]

KIND_WEIGHTS = {
    "purpose": 0.42,
    "arguments": 0.2,
    "where": 0.16,
    "import": 0.07,
    "kind": 0.06,
    "base": 0.05,
    "members": 0.04,
}

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are a helpful, respectful and honest assistant.",
    "A chat between a curious user and an artificial intelligence assistant.",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions.",
    "You are an expert in Python.",
    "You are a coding assistant.",
    "Answer the question.",
    "Be concise.",
)

_PREFIXES = (
    "Please ", "Hi, ", "Hi! ", "Hello, ", "Hello! ", "Hey, ", "Hey! ", "Quick question: ", "Question: ", "Sorry, ",
    "Ok, ", "Okay, ", "Now, ", "So, ", "Well, ", "Python question: ", "In Python, ", "Excuse me, ", "One more: ",
)  # fmt: skip
_SUFFIXES = (
    " please",
    ", please",
    " in Python",
    " exactly",
    " Thanks!",
    " Thank you.",
    " I need to know.",
    " Please tell me.",
)
_KIND_WORDS = {"exception": ("exception", "class")}


@dataclass
class Conversation:
    """Turns of (question, answer), and the system message before them if there is one."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages


class Speaker:
    """Draws conversations from one random stream; the same seed gives the same conversations."""

    def __init__(self, knowledge: Knowledge, seed: int, forbidden_names: frozenset[str] = frozenset()) -> None:
        self.knowledge = knowledge
        self.rng = random.Random(seed)
        self.forbidden_names = forbidden_names
        self.by_kind = {
            kind: [entry for entry in knowledge.entries if kind in knowledge.questions(entry)] for kind in KIND_WEIGHTS
        }
        self.ambiguous = sorted(knowledge.ambiguous)

    def conversations(self) -> Iterator[Conversation]:
        while True:
            yield self.conversation()

    def conversation(self) -> Conversation:
        rng = self.rng
        length = rng.choices((1, 2, 3, rng.randint(4, 8), rng.randint(15, 35)), (0.5, 0.2, 0.15, 0.14, 0.01))[0]
        conversation = Conversation(rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.12 else None)
        turns = self._turns()
        while len(conversation.turns) < length:
            conversation.turns.append(next(turns))
        return conversation

    def fact(self) -> tuple[str, Entry]:
        """A random kind of question and an entry that has an answer to it."""
        kind = self.rng.choices(tuple(KIND_WEIGHTS), tuple(KIND_WEIGHTS.values()))[0]
        return kind, self.rng.choice(self.by_kind[kind])

    def _turns(self) -> Iterator[Turn]:
        """Turn after turn; `topic` is what "it" means: a known entry, a name that is not known, or nothing yet."""
        rng, knowledge = self.rng, self.knowledge
        topic: Entry | str | None = None
        kind = "purpose"
        while True:
            draw = rng.random()
            if topic is not None and draw < 0.45:
                choices = knowledge.questions(topic) if isinstance(topic, Entry) else ["purpose", "where", "arguments"]
                kind = rng.choice(choices)
                answer = knowledge.answer(kind, topic) if isinstance(topic, Entry) else small_talk.unknown(topic)
                yield self._noisy(follow_up(kind, rng), None), answer
            elif topic is not None and draw < 0.57:
                topic = rng.choice(self.by_kind[kind]) if rng.random() < 0.8 else self._unknown_name()
                yield self._about(topic, kind, rng.choice(SAME_QUESTION))
            elif topic is None and draw < 0.012:
                yield self._noisy(follow_up(rng.choice(tuple(FOLLOW_UP)), rng), None), small_talk.NO_REFERENT
            elif (part := rng.random()) < 0.67:
                kind, topic = self.fact()
                yield self._about(topic, kind, phrasing(kind, rng))
            elif part < 0.69:
                short = rng.choice(self.ambiguous)
                kind = rng.choice(("purpose", "where", "arguments"))
                yield self._noisy(phrasing(kind, rng), short), knowledge.which_one(short)
                topic = knowledge.by_name[rng.choice(knowledge.ambiguous[short])]
                if kind in knowledge.questions(topic):
                    question = self._noisy(rng.choice(("{x}", "{x}", "I mean {x}.", "{x}, please.")), topic.name)
                    yield question, knowledge.answer(kind, topic)
            elif part < 0.83:
                topic, kind = self._unknown_name(), self.fact()[0]
                yield self._about(topic, kind, phrasing(kind, rng))
            elif part < 0.95:
                question, answer = small_talk.off_topic(rng, knowledge)
                yield self._noisy(question, None), answer
            else:
                answer, forms, _ = rng.choice(small_talk.IDENTITY)
                yield self._noisy(rng.choice(forms), None), answer

    def _unknown_name(self) -> str:
        return small_talk.unknown_name(self.rng, self.knowledge, self.forbidden_names)

    def _about(self, topic: Entry | str, kind: str, form: str) -> Turn:
        if isinstance(topic, str):
            return self._noisy(form, self._decorated(topic, None)), small_talk.unknown(topic)
        return self._noisy(form, self.mention(topic)), self.knowledge.answer(kind, topic)

    def mention(self, entry: Entry) -> str:
        rng = self.rng
        shorts = self.knowledge.short_names.get(entry.name)
        name = rng.choice(shorts) if shorts and rng.random() < 0.33 else entry.name
        if entry.kind in ("class", "exception") and rng.random() < 0.04:
            name = name.lower() if self.knowledge.spelling_is_free(name.lower()) else name
        return self._decorated(name, entry.kind)

    def _decorated(self, name: str, kind: str | None) -> str:
        rng = self.rng
        draw = rng.random()
        if draw < 0.12:
            return f"`{name}`"
        if draw < 0.17:
            return rng.choice(("'{}'", '"{}"')).format(name)
        if draw < 0.24 and kind in (None, "function", "method"):
            return f"{name}()"
        if draw < 0.34:
            word = rng.choice(_KIND_WORDS.get(kind, (kind,))) if kind else rng.choice(("function", "class", "module"))
            return rng.choice(("the {} {}", "the {} {}", "Python's {} {}", "{1} {0}")).format(name, word)
        return name

    def _noisy(self, form: str, mention: str | None) -> str:
        """The question as people type it: politeness, small letters, missing punctuation, slips in the common words."""
        rng = self.rng
        if rng.random() < 0.09:
            form = self._with_slip(form)
        if rng.random() < 0.06:
            form = self._without_a_word(form)
        if rng.random() < 0.12:
            form = rng.choice(_PREFIXES) + (form if form.startswith(("I ", "I'", "{")) else form[:1].lower() + form[1:])
        elif rng.random() < 0.07:
            form = f"{small_talk.stray_words(rng).capitalize()}{rng.choice((',', ',', ':', '.'))} {form}"
        if rng.random() < 0.05 and form[-1:] in "?.":
            form = f"{form[:-1]}{rng.choice((' ', ', ', ', or ', ', and '))}{small_talk.stray_words(rng)}{form[-1]}"
        if rng.random() < 0.08 and form[-1:] in "?.":
            form = form[:-1] + rng.choice(_SUFFIXES)
            form += rng.choice(("?", "", ".")) if form[-1].isalpha() else ""
        if rng.random() < 0.15:
            form = form.lower()
        if rng.random() < 0.16:
            form = form.rstrip("?.!")
        elif rng.random() < 0.03:
            form += rng.choice(("?", "??", "!", " ", "\n"))
        return form.replace("{x}", mention) if mention else form

    def _without_a_word(self, form: str) -> str:
        words = form.split(" ")
        optional = [i for i, word in enumerate(words) if "{x}" not in word]
        if len(words) < 5 or not optional:
            return form
        del words[self.rng.choice(optional)]
        return " ".join(words)

    def _with_slip(self, form: str) -> str:
        rng = self.rng
        words = form.split(" ")
        at = rng.randrange(len(words))
        word = words[at]
        if len(word) < 4 or not re.fullmatch(r"\w+", word):
            return form
        i = rng.randrange(1, len(word) - 1)
        words[at] = rng.choice(
            (word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], word[:i] + word[i + 1] + word[i] + word[i + 2 :])
        )
        return " ".join(words)
