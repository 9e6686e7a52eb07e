from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.load.generate import LoadOptions, make_work
from benchmarks.load.workload import Lengths, PromptWriter, read_sessions, synthetic_sessions
from benchmarks.options import BenchmarkError


def lengths(text: str, count: int = 5000) -> np.ndarray:
    return np.array(Lengths.parse(text).sample(count, np.random.default_rng(0)))


def test_lengths_follow_their_distribution() -> None:
    assert set(lengths("7")) == {7}
    uniform = lengths("uniform:3:5")
    assert set(uniform) == {3, 4, 5}
    normal = lengths("normal:100:10")
    assert (normal.mean(), normal.std()) == pytest.approx((100, 10), rel=0.05)
    assert np.median(lengths("lognormal:50:0.5")) == pytest.approx(50, rel=0.05)
    assert lengths("normal:1:50").min() == 1


@pytest.mark.parametrize("text", ["0", "x", "uniform:5", "uniform:5:3", "normal:10:-1", "zipf:3", ""])
def test_bad_lengths_are_one_line(text: str) -> None:
    with pytest.raises(BenchmarkError, match=r"^length "):
        Lengths.parse(text)


@pytest.mark.parametrize("count", [1, 2, 17, 300])
def test_prompts_have_exactly_the_tokens_asked_for(writer: PromptWriter, count: int) -> None:
    text = writer.write(count, np.random.default_rng(1))
    assert writer.count(text) == count


def test_prompts_count_the_special_tokens_that_the_server_will_add(model: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"a": {"id": "a", "ids": [64], "tokens": ["a"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    writer = PromptWriter(tmp_path)
    text = writer.write(9, np.random.default_rng(0))
    assert writer.count(text) == 9
    assert writer.count(text, special_tokens=False) == 8


def test_a_shared_prefix_is_shared_and_the_rest_is_not(writer: PromptWriter) -> None:
    rng = np.random.default_rng(0)
    sessions = synthetic_sessions(writer, 3, Lengths.parse("20"), Lengths.parse("4"), rng, prefix_tokens=12)
    texts = [session.turns[0].text for session in sessions]
    assert [writer.count(text) for text in texts] == [20, 20, 20]
    words = [text.split() for text in texts]
    assert words[0][:12] == words[1][:12] == words[2][:12]
    assert len({tuple(rest[12:]) for rest in words}) == 3


def test_a_prefix_must_fit(writer: PromptWriter) -> None:
    with pytest.raises(BenchmarkError, match="prefix of 20"):
        synthetic_sessions(
            writer, 1, Lengths.parse("20"), Lengths.parse("4"), np.random.default_rng(0), prefix_tokens=20
        )


def test_later_turns_add_their_own_tokens(writer: PromptWriter) -> None:
    (session,) = synthetic_sessions(
        writer, 1, Lengths.parse("10"), Lengths.parse("4"), np.random.default_rng(0), num_turns=3
    )
    together = "".join(turn.text for turn in session.turns)
    assert [turn.num_tokens for turn in session.turns] == [10, 10, 10]
    assert writer.count(together) == 30


def test_the_same_seed_is_the_same_work(writer: PromptWriter) -> None:
    options = LoadOptions(prompt="uniform:5:9", arrivals="poisson:3", requests=4, seed=3)
    first, again = make_work(options, writer), make_work(options, writer)
    assert first.sessions == again.sessions
    other = make_work(LoadOptions(prompt="uniform:5:9", arrivals="poisson:3", requests=4, seed=4), writer)
    assert first.sessions != other.sessions


def test_the_arrivals_do_not_change_the_prompts(writer: PromptWriter) -> None:
    closed = make_work(LoadOptions(prompt="8", arrivals="closed:2", requests=4), writer)
    opened = make_work(LoadOptions(prompt="8", arrivals="poisson:3", requests=4), writer)
    assert closed.sessions == opened.sessions


def test_jsonl(writer: PromptWriter, tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    path.write_text('{"prompt": " ban", "output_tokens": 3, "timestamp": 7.5}\n{"prompt": " dart ban"}\n')
    first, second = read_sessions(path, writer, Lengths.parse("6"), np.random.default_rng(0))
    assert (first.turns[0].text, first.turns[0].num_tokens, first.turns[0].output_tokens) == (" ban", 1, 3)
    assert first.timestamp == 7.5
    assert (second.turns[0].output_tokens, second.timestamp) == (6, None)


def test_sharegpt(writer: PromptWriter, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    turns = [("human", " ban dart"), ("gpt", " bart ban dan"), ("human", " ban"), ("gpt", " dan"), ("human", " ban")]
    chats = [{"conversations": [{"from": who, "value": text} for who, text in turns]}, {"conversations": []}]
    path.write_text(json.dumps(chats))
    (session,) = read_sessions(path, writer, Lengths.parse("6"), np.random.default_rng(0))
    assert [(turn.num_tokens, turn.output_tokens) for turn in session.turns] == [(2, 3), (1, 1)]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", '{"text": "x"}', "entry 1 is not in JSONL or ShareGPT format"),
        ("a.jsonl", '{"prompt": 3}', "entry 1 is not in JSONL or ShareGPT format"),
        ("a.jsonl", "nonsense", "cannot read the workload file"),
        ("a.json", '[{"conversations": []}]', "holds no prompts"),
        ("a.json", '[{"conversations": 3}]', "entry 1 is not in JSONL or ShareGPT format"),
    ],
)
def test_bad_files_are_one_line(writer: PromptWriter, tmp_path: Path, name: str, content: str, complaint: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BenchmarkError, match=complaint) as raised:
        read_sessions(tmp_path / name, writer, Lengths.parse("6"), np.random.default_rng(0))
    assert "\n" not in str(raised.value)


def test_a_file_with_too_few_sessions_is_refused(writer: PromptWriter, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": " ban"}\n')
    with pytest.raises(BenchmarkError, match="holds 1 sessions, 5 are asked for"):
        make_work(LoadOptions(dataset=str(tmp_path / "a.jsonl"), requests=5), writer)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"tokenizer\.json not found"):
        PromptWriter(tmp_path)
