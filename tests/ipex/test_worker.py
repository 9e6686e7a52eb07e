"""The worker with --ipex, for real; the same model on Transformers alone is the oracle."""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ipex_vllm.demo import MODEL_DIR
from tests.processes import Program, Server, eventually
from tests.support import as_transformers_5_writes_it, generate, stream

PROMPT = "import json\n\ndef load(path):\n"
QUESTIONS = [
    f"<|im_start|>user\n{json.loads(line)['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    for line in (MODEL_DIR.parent / "evaluation.jsonl").read_text().splitlines()[:8]
]
# One core: with more, OpenMP's threads wait for each other wherever the machine is busy with something else.
OPTIONS = ("--ipex", "--no-register", "--cores", str(min(os.sched_getaffinity(0))))

pytestmark = pytest.mark.filterwarnings("ignore")  # of a Transformers older than Python's and PyTorch's warnings


def worker(folder: Path, *arguments: str) -> Server:
    return Server(folder, "/ready", "workers.hf_worker", *OPTIONS, *arguments)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """In float32, where rounding does not choose between nearly equal tokens."""
    model = as_transformers_5_writes_it(tmp_path_factory.mktemp("model"))
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    arguments = ("--model-path", str(model), "--low-bit", "fp32", "--max-model-len", "256")
    with worker(tmp_path_factory.mktemp("service") / "worker", *arguments) as running:
        yield running.url
        assert running.stop() == 0
    assert files == {file.name: file.read_bytes() for file in model.iterdir()}


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def greedy(url: str, prompt: str = PROMPT, **params: Any) -> dict[str, Any]:
    answer = generate(url, **{"prompt": prompt, "temperature": 0, "echo": False, "max_new_tokens": 24, **params})
    assert answer["error_code"] == 0, answer
    return answer


def reference(plain: Any, tokenizer: Any, prompt: str, num_tokens: int) -> str:
    """The greedy text by Transformers alone, up to the end of the turn."""
    token_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = plain.generate(token_ids, max_new_tokens=num_tokens, do_sample=False)[0]
    text: str = tokenizer.decode(output[token_ids.shape[1] :], skip_special_tokens=True)
    return text


def test_greedy_texts_are_those_of_transformers_alone(url: str, plain: Any, tokenizer: Any) -> None:
    answers = [greedy(url, prompt, max_new_tokens=40)["text"] for prompt in (PROMPT, *QUESTIONS)]
    assert answers == [reference(plain, tokenizer, prompt, 40) for prompt in (PROMPT, *QUESTIONS)]
    assert len(set(answers)) == 9


def test_a_stream_grows_to_the_same_text(url: str) -> None:
    frames = stream(url, prompt=QUESTIONS[0], temperature=0, echo=False, max_new_tokens=100)
    texts = [frame["text"] for frame in frames]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert [frame["finish_reason"] for frame in frames[-2:]] == [None, "stop"]
    assert texts[-1] == greedy(url, QUESTIONS[0], max_new_tokens=100)["text"]


def test_logprobs_are_the_models_own_and_echo_adds_the_prompts(url: str, plain: Any, tokenizer: Any) -> None:
    answer = greedy(url, echo=True, max_new_tokens=6, logprobs=2, repetition_penalty=1.3)
    token_ids = tokenizer(answer["text"], return_tensors="pt")["input_ids"]
    expected = plain(token_ids).logits[0].log_softmax(dim=-1).detach()
    logprobs = answer["logprobs"]
    assert "".join(logprobs["tokens"]) == answer["text"]
    assert logprobs["token_logprobs"][0] is None
    for position, token_id in enumerate(token_ids[0].tolist()[1:], 1):
        chosen = expected[position - 1, token_id].item()
        assert logprobs["token_logprobs"][position] == pytest.approx(chosen, abs=1e-3)
        assert max(logprobs["top_logprobs"][position].values()) == pytest.approx(
            expected[position - 1].max().item(), abs=1e-3
        )


def test_a_prompt_of_one_token_has_no_logprob(url: str) -> None:
    logprobs = greedy(url, "import", echo=True, max_new_tokens=1, logprobs=0)["logprobs"]
    assert (logprobs["tokens"][0], logprobs["token_logprobs"][0]) == ("import", None)
    assert len(logprobs["tokens"]) == 2


def test_sampling_parameters_reach_the_model(url: str) -> None:
    def text(**params: Any) -> str:
        answer: str = greedy(url, ignore_eos=True, **params)["text"]
        return answer

    likeliest = text()
    for params in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert text(temperature=2.0, **params) == likeliest
    assert text(temperature=2.0, seed=1) == text(temperature=2.0, seed=1) != likeliest
    assert text(temperature=2.0, seed=1) != text(temperature=2.0, seed=2)
    assert text(repetition_penalty=2.0) != likeliest
    until_it_repeats = text(max_new_tokens=100)
    assert text(max_new_tokens=100, presence_penalty=2.0, frequency_penalty=2.0) != until_it_repeats


def test_several_choices_differ_when_sampled_and_each_is_the_greedy_one_otherwise(url: str) -> None:
    sampled = greedy(url, n=3, temperature=2.0, seed=5, ignore_eos=True)
    assert len({choice["text"] for choice in sampled["choices"]}) == 3
    single = greedy(url, logprobs=1)
    alike = greedy(url, n=3, logprobs=1)
    assert [choice["text"] for choice in alike["choices"]] == [single["text"]] * 3
    for choice in alike["choices"]:
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(single["logprobs"]["token_logprobs"], abs=1e-3)


def test_stop_strings_stop_ids_and_the_length_end_a_text(url: str, tokenizer: Any) -> None:
    text = greedy(url)["text"]
    assert greedy(url, stop=[text[9:12]])["text"] == text[: text.index(text[9:12])]
    assert greedy(url, max_new_tokens=3)["finish_reason"] == "length"
    past_end = greedy(url, QUESTIONS[0], max_new_tokens=80, ignore_eos=True)
    assert (past_end["usage"]["completion_tokens"], past_end["finish_reason"]) == (80, "length")
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stopped = greedy(url, QUESTIONS[0], max_new_tokens=80, ignore_eos=True, stop_token_ids=[end_of_turn])
    assert stopped["text"] == greedy(url, QUESTIONS[0], max_new_tokens=80)["text"]


def test_the_context_can_be_filled_to_the_last_token(url: str) -> None:
    length = httpx.post(f"{url}/model_details", trust_env=False).json()["context_length"]
    almost_full = "a" + " a" * (length - 10)
    full = greedy(url, almost_full, max_new_tokens=10**6, ignore_eos=True)
    assert full["usage"] == {"prompt_tokens": length - 9, "completion_tokens": 9, "total_tokens": length}


def test_embeddings_are_normalised_means(url: str, plain: Any, tokenizer: Any) -> None:
    texts = ["import os", "A much longer text, with many more tokens than the first one has."]
    answer = httpx.post(f"{url}/worker_get_embeddings", json={"input": texts}, timeout=60, trust_env=False).json()
    for text, vector in zip(texts, answer["embedding"], strict=True):
        token_ids = tokenizer(text, return_tensors="pt")["input_ids"]
        hidden = plain(token_ids, output_hidden_states=True).hidden_states[-1][0]
        expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
        torch.testing.assert_close(torch.tensor(vector), expected.detach(), atol=1e-3, rtol=0)


has_avx512 = {"avx512bw", "avx512vl", "avx512dq"}.issubset(Path("/proc/cpuinfo").read_text().split())
needs_avx512 = pytest.mark.skipif(not has_avx512, reason="the extension packs bfloat16 for AVX-512 alone")


@pytest.mark.parametrize("low_bit", [None, pytest.param("bf16", marks=needs_avx512), "sym_int8", "sym_int4"])
def test_each_format_answers_and_drains(low_bit: str | None, tmp_path: Path) -> None:
    chosen = () if low_bit is None else ("--low-bit", low_bit)
    with worker(tmp_path / "worker", "--model-path", "demo", *chosen) as running:
        question = "<|im_start|>user\nWhat does itertools.chain do?<|im_end|>\n<|im_start|>assistant\n"
        assert "iterable" in greedy(running.url, question, max_new_tokens=100)["text"]
        with ThreadPoolExecutor() as pool:
            ask = functools.partial(stream, running.url, prompt=PROMPT, max_new_tokens=100, ignore_eos=True)
            answer = pool.submit(ask)
            eventually(lambda: queue_length(running.url) == 1, "the request runs")
            assert running.stop() == 0
            assert answer.result()[-1]["usage"]["completion_tokens"] == 100


def queue_length(url: str) -> int:
    length: int = httpx.post(f"{url}/worker_get_status", trust_env=False).json()["queue_length"]
    return length


@pytest.mark.skipif(has_avx512, reason="the extension has bfloat16 here")
def test_bfloat16_is_refused_where_the_extension_has_none(tmp_path: Path) -> None:
    command = ("-m", "workers.hf_worker", *OPTIONS, "--model-path", "demo", "--low-bit", "bf16")
    with Program(tmp_path / "worker", sys.executable, *command) as running:
        assert running.process.wait(120) == 1
        says = "and this one has neither; choose --low-bit fp32, sym_int8 or sym_int4"
        assert running.output.splitlines()[-1].endswith(says)


def test_a_model_whose_weights_the_extension_does_not_quantize_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=4096)).save_pretrained(model)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(model)
    command = ("-m", "workers.hf_worker", *OPTIONS, "--model-path", str(model), "--low-bit", "sym_int4")
    with Program(tmp_path / "worker", sys.executable, *command) as running:
        assert running.process.wait(120) == 1
        says = "error: --low-bit sym_int4: the extension does not quantize a GPT2LMHeadModel"
        assert running.output.splitlines()[-1] == says
