"""Builds the data set: `python -m training.build_dataset --out DIR`. The same Python gives the same bytes.

facts.jsonl       every entry; the conversations of the training are drawn from these
tokenizer.json    byte-level BPE, learnt on a sample of such conversations
evaluation.jsonl  the fixed questions of `python -m ipex_vllm.demo.evaluate`
"""

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training import small_talk
from training.conversations import Speaker
from training.facts import PYTHON_VERSION, Entry, collect
from training.held_out import OFF_TOPIC, UNKNOWN_NAMES
from training.questions import FOLLOW_UP, FOLLOW_UP_HELD_OUT, HELD_OUT, SAME_QUESTION_HELD_OUT, TRAINED, Knowledge

VOCAB_SIZE = 4096
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
NUM_FACTS = 1000
NUM_FOLLOW_UPS = 300
EVALUATION_SEED = 20_000
TOKENIZER_SEED = 10_000
TOKENIZER_CONVERSATIONS = 40_000
FORBIDDEN_NAMES = frozenset(name for name, _ in UNKNOWN_NAMES)

# GPT-2's split into words, numbers, punctuation and spaces, without its rule for English contractions.
SPLIT = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def render(messages: Sequence[dict[str, str]]) -> str:
    """The messages as text in the chat format; the chat template of the tokenizer says the same in Jinja."""
    return "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)


def build_tokenizer(knowledge: Knowledge) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(knowledge), trainer)
    return tokenizer


def _tokenizer_text(knowledge: Knowledge) -> Iterator[str]:
    speaker = Speaker(knowledge, TOKENIZER_SEED, FORBIDDEN_NAMES)
    for _ in range(TOKENIZER_CONVERSATIONS):
        yield from (f"{message['role']}\n{message['content']}" for message in speaker.conversation().messages())


def evaluation(knowledge: Knowledge) -> Iterator[dict[str, object]]:
    """The evaluation's examples: section, messages up to a question, and the right answer."""
    speaker = Speaker(knowledge, EVALUATION_SEED, FORBIDDEN_NAMES)
    rng = speaker.rng
    facts: dict[tuple[str, str], tuple[str, Entry]] = {}
    while len(facts) < NUM_FACTS:
        kind, entry = speaker.fact()
        facts[kind, entry.name] = kind, entry
    for section, forms in (("facts", TRAINED), ("held_out", HELD_OUT)):
        for kind, entry in facts.values():
            question = rng.choice(forms[kind]).replace("{x}", speaker.mention(entry))
            yield _example(section, [question], [knowledge.answer(kind, entry)])
    for index in range(NUM_FOLLOW_UPS):
        questions, answers = _follow_up(speaker, FOLLOW_UP if index % 2 else FOLLOW_UP_HELD_OUT)
        yield _example("follow_ups", questions, answers)
    for question in OFF_TOPIC:
        yield _example("off_topic", [question], [small_talk.OFF_TOPIC])
    for name, question in UNKNOWN_NAMES:
        yield _example("off_topic", [question], [small_talk.unknown(name)])
    for answer, _, held_out in small_talk.IDENTITY:
        for question in held_out:
            yield _example("identity", [question], [answer])


def _follow_up(speaker: Speaker, forms: dict[str, tuple[str, ...]]) -> tuple[list[str], list[str]]:
    """A question about a name, then one or two about "it"; in a quarter of the cases the last one names another."""
    rng, knowledge = speaker.rng, speaker.knowledge
    kind, entry = speaker.fact()
    questions = [rng.choice(TRAINED[kind]).replace("{x}", speaker.mention(entry))]
    answers = [knowledge.answer(kind, entry)]
    for _ in range(rng.choice((1, 2))):
        kind = rng.choice([k for k in knowledge.questions(entry) if k != kind])
        questions.append(rng.choice(forms[kind]))
        answers.append(knowledge.answer(kind, entry))
    if rng.random() < 0.25:
        entry = rng.choice(speaker.by_kind[kind])
        questions.append(rng.choice(SAME_QUESTION_HELD_OUT).replace("{x}", speaker.mention(entry)))
        answers.append(knowledge.answer(kind, entry))
    return questions, answers


def _example(section: str, questions: list[str], answers: list[str]) -> dict[str, object]:
    messages = []
    for question, answer in zip(questions, answers, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"section": section, "messages": messages[:-1], "answer": answers[-1]}


def write_jsonl(path: Path, rows: Iterator[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_facts(path: Path) -> list[Entry]:
    return [Entry(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def build(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    knowledge = Knowledge(collect())
    write_jsonl(out / "facts.jsonl", (asdict(entry) for entry in knowledge.entries))
    write_jsonl(out / "evaluation.jsonl", evaluation(knowledge))
    build_tokenizer(knowledge).save(str(out / "tokenizer.json"))
    print(f"{len(knowledge.entries)} entries in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the data set to")
    args = parser.parse_args()
    if platform.python_version() != PYTHON_VERSION:
        raise SystemExit(
            f"the facts are Python {PYTHON_VERSION}'s: run this with that version, not {platform.python_version()}"
        )
    build(args.out)


if __name__ == "__main__":
    main()
