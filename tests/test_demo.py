"""The demo model keeps its promises: size, formats and answers; and its data set can be built again."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from ipex_vllm.demo import MODEL_DIR, resolve_model_path
from ipex_vllm.demo.evaluate import (
    EVALUATION_FILE,
    Example,
    load_examples,
    open_transformers,
    perplexity,
    score,
    transformers_answers,
)
from training import build_dataset, conversations, held_out, questions, small_talk
from training.facts import collect
from training.model import Llama, Shape, round_to_sym_int4
from training.train import conversation_mask, pack


@pytest.fixture(scope="module")
def demo():
    torch.manual_seed(0)
    return open_transformers(str(MODEL_DIR), dtype=torch.float32)


@pytest.fixture(scope="module")
def knowledge():
    return questions.Knowledge(collect())


def test_the_name_demo_stands_for_the_shipped_folder_and_other_names_for_themselves():
    assert resolve_model_path("demo") == str(MODEL_DIR)
    assert resolve_model_path("/models/demo-7b") == "/models/demo-7b"


def test_size_stays_within_the_limits():
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert sum(tensor.numel() for tensor in tensors.values()) <= 12_000_000
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(size % 64 == 0 for tensor in tensors.values() for size in tensor.shape)
    shipped = [*MODEL_DIR.iterdir(), EVALUATION_FILE]
    assert sum(path.stat().st_size for path in shipped) <= 24_000_000


def test_config_is_what_every_loader_expects():
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64
    assert config["vocab_size"] <= 8192
    assert config["max_position_embeddings"] == 2048
    # Transformers 4 reads these two; version 5 reads them as well and calls them dtype and rope_parameters.
    assert config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == 10000.0


@pytest.mark.parametrize("text", ["What does os.makedirs do?", "naïve café 🐍\t\n  x\r\n", "<|im_end|>", "f(x) ..."])
def test_tokenizer_gives_every_text_back(demo, text):
    _, tokenizer = demo
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_chat_template_is_the_format_of_the_training_and_turns_end_with_eos(demo):
    model, tokenizer = demo
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == build_dataset.render(messages)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert tokenizer.eos_token == build_dataset.END
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_hundred_questions_are_answered_as_promised(demo):
    model, tokenizer = demo
    limits = {"facts": 30, "held_out": 30, "follow_ups": 20, "off_topic": 20}
    examples = [e for section, limit in limits.items() for e in load_examples(limit) if e.section == section]
    assert Counter(example.section for example in examples) == limits
    shares = score(examples, transformers_answers(model, tokenizer, examples))
    assert shares["facts"] >= 0.97
    assert shares["held_out"] >= 0.85
    assert shares["follow_ups"] >= 0.9
    assert shares["off_topic"] >= 0.9
    facts = [example for example in examples if example.section == "held_out"]
    assert perplexity(model, tokenizer, facts) < 1.05


def test_score_counts_exact_answers_and_any_way_to_decline():
    fact = Example("facts", ({"role": "user", "content": "?"},), "len is built in.")
    off_topic = Example("off_topic", ({"role": "user", "content": "?"},), small_talk.OFF_TOPIC)
    assert score([fact, fact, off_topic], [" len is built in.\n", "len is built in", small_talk.NO_TASKS]) == {
        "facts": 0.5,
        "off_topic": 1.0,
    }
    assert score([off_topic], ["The capital of France is Paris."]) == {"off_topic": 0.0}


@pytest.mark.runs(
    "python -m training.build_dataset --out .cache/demo-data",
)
def test_the_data_set_is_built_to_the_same_bytes_and_is_the_shipped_one(tmp_path: Path):
    # In a process of its own: what else is imported can change what there is to introspect.
    subprocess.run([sys.executable, "-m", "training.build_dataset", "--out", tmp_path], check=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == (MODEL_DIR / "tokenizer.json").read_bytes()
    assert (tmp_path / "evaluation.jsonl").read_bytes() == EVALUATION_FILE.read_bytes()


def test_the_training_never_shows_what_the_evaluation_holds_out(knowledge):
    names = {name for name, _ in held_out.UNKNOWN_NAMES}
    assert not any(knowledge.knows(name) for name in names)
    speaker = conversations.Speaker(knowledge, seed=1000, forbidden_names=frozenset(names))
    asked = {question for _ in range(20_000) for question, _ in speaker.conversation().turns}
    held_out_questions = {
        example.messages[-1]["content"] for example in load_examples() if example.section in ("held_out", "off_topic")
    }
    assert asked.isdisjoint(held_out_questions)


def test_answers_are_sentences_about_the_name_asked_for(knowledge):
    answers = {
        name: questions.purpose_answer(knowledge.by_name[name])
        for name in ("itertools.chain", "os.getcwd", "list.append", "collections.deque", "functools.partial")
    }
    assert answers["itertools.chain"].startswith("itertools.chain returns a chain object whose .__next__() method ")
    assert answers["os.getcwd"] == "os.getcwd returns a unicode string representing the current working directory."
    assert answers["list.append"] == "list.append appends object to the end of the list."
    assert answers["collections.deque"].startswith("collections.deque is a list-like sequence optimized for ")
    assert answers["functools.partial"].startswith("The documentation of functools.partial says: New function with ")


def test_the_trainer_computes_what_transformers_computes(demo):
    reference, _ = demo
    model = Llama(Shape())
    model.load_state_dict({k: v for k, v in reference.state_dict().items() if k != "lm_head.weight"})
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    texts = [
        build_dataset.render([*example.messages, {"role": "assistant", "content": example.answer}])
        for example in load_examples(3)
    ]
    tokens, targets, numbers = (torch.from_numpy(rows).long() for rows in pack(tokenizer, iter(texts), 1, 2048))
    with torch.inference_mode():
        packed = model(tokens, targets, conversation_mask(numbers))
        losses, counts = [], []
        for number in range(len(texts)):
            at = numbers[0] == number
            logits = reference(tokens[:, at]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, targets[0, at], ignore_index=-100, reduction="sum"))
            counts.append(int((targets[0, at] != -100).sum()))
    # One row of many conversations must give what each of them gives alone: attention does not cross their borders.
    assert packed.item() == pytest.approx(sum(losses).item() / sum(counts), rel=1e-3, abs=1e-6)


def test_sym_int4_rounding_is_that_of_q4_0():
    weight = torch.zeros(2, 64)
    weight[0, :4] = torch.tensor([-8.0, 7.0, 0.4, 0.6])
    weight[1, 40] = 3.0
    rounded = round_to_sym_int4(weight)
    assert rounded[0, :5].tolist() == [-8.0, 7.0, 0.0, 1.0, 0.0]
    assert rounded[1, 40] == 3.0
    assert rounded.count_nonzero() == 4
