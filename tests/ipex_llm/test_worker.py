"""The worker on ipex-llm's engine, for real: the protocol, and what the engine's processes leave behind."""

import functools
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastchat.conversation import Conversation, SeparatorStyle

from benchmarks.make_model import make_model
from ipex_vllm.engines.ipex_llm import CPU_FORMATS
from tests.processes import Program, Server, eventually, worker
from tests.support import as_transformers_5_writes_it, generate, stream

# One core: with more, OpenMP's threads wait for each other wherever the machine is busy with something else.
ENGINE = ("--engine", "ipex-llm", "--no-register", "--cores", str(min(os.sched_getaffinity(0))))
PROMPT = "<|im_start|>user\nWhat does itertools.chain do?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = as_transformers_5_writes_it(tmp_path_factory.mktemp("model"))
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    # In float32, so that the order of a batch's sums does not decide between nearly equal logits.
    arguments = (*ENGINE, "--model-path", str(model), "--model-names", "demo", "--low-bit", "fp32")
    with worker(tmp_path_factory.mktemp("service") / "worker", *arguments) as running:
        yield running.url
        assert running.stop() == 0
    assert files == {file.name: file.read_bytes() for file in model.iterdir()}


def text(url: str, **params: object) -> str:
    answer = generate(url, **{"prompt": PROMPT, "echo": False, "max_new_tokens": 24, "temperature": 0, **params})
    assert answer["error_code"] == 0, answer
    result: str = answer["text"]
    return result


def test_a_stream_grows_and_ends_twice_with_the_whole_answer(url: str) -> None:
    frames = stream(url, prompt=PROMPT, echo=False, temperature=0, max_new_tokens=200)
    texts = [frame["text"] for frame in frames]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert [frame["finish_reason"] for frame in frames[-2:]] == [None, "stop"]
    assert texts[-1] == texts[-2] == text(url, max_new_tokens=200)
    assert "iterable" in texts[-1]


def test_the_chat_template_is_the_models_own(url: str) -> None:
    conv = httpx.post(f"{url}/worker_get_conv_template", trust_env=False).json()["conv"]
    conversation = Conversation(**{**conv, "sep_style": SeparatorStyle(conv["sep_style"]), "messages": []})
    conversation.append_message(conversation.roles[0], "What does itertools.chain do?")
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt() != PROMPT, "a notation, which the worker reads"
    told = generate(url, prompt=conversation.get_prompt(), echo=False, temperature=0, max_new_tokens=24)
    assert told["error_code"] == 0, told
    tokens = told["usage"]["prompt_tokens"]
    plain = generate(url, prompt=PROMPT, echo=False, temperature=0, max_new_tokens=24)
    assert (told["text"], tokens) == (plain["text"], plain["usage"]["prompt_tokens"])


def test_sampling_parameters_reach_the_engine(tmp_path: Path) -> None:
    """On random weights: the demo model is so sure of some answers that no temperature changes them."""
    model = make_model("tiny", tmp_path / "tiny")
    with worker(tmp_path / "worker", *ENGINE, "--model-path", str(model), "--low-bit", "fp32") as running:
        text_with = functools.partial(text, running.url, ignore_eos=True)
        greedy = text_with()
        assert text_with(temperature=2.0, top_k=1) == greedy
        assert text_with(temperature=2.0, top_p=0) == greedy
        assert text_with(temperature=2.0, min_p=1.0) == greedy
        assert text_with(temperature=2.0, seed=1) == text_with(temperature=2.0, seed=1) != greedy
        assert text_with(temperature=2.0, seed=1) != text_with(temperature=2.0, seed=2)
        assert text_with(repetition_penalty=2.0) != greedy
        assert text_with(presence_penalty=2.0, frequency_penalty=2.0) != greedy


def test_several_choices_are_those_of_single_requests(url: str) -> None:
    answer = generate(url, prompt=PROMPT, echo=False, max_new_tokens=24, temperature=2.0, seed=5, n=3)
    choices = [choice["text"] for choice in answer["choices"]]
    assert choices == [text(url, temperature=2.0, seed=5 + index) for index in range(3)]
    assert len(set(choices)) == 3
    assert all(choice["finish_reason"] for choice in answer["choices"])


def test_stop_strings_stop_ids_and_the_length_end_a_text(url: str) -> None:
    greedy = text(url)
    assert text(url, stop=[greedy[6:9]]) == greedy[: greedy.index(greedy[6:9])]
    assert generate(url, prompt=PROMPT, max_new_tokens=3, temperature=0)["finish_reason"] == "length"
    past_eos = generate(url, prompt=PROMPT, temperature=0, max_new_tokens=64, ignore_eos=True)
    assert (past_eos["usage"]["completion_tokens"], past_eos["finish_reason"]) == (64, "length")
    end_of_turn = 2
    assert text(url, max_new_tokens=200, ignore_eos=True, stop_token_ids=[end_of_turn]) == text(url, max_new_tokens=200)


def test_echo_and_logprobs_cover_prompt_and_completion(url: str) -> None:
    answer = generate(url, prompt=PROMPT, echo=True, temperature=0, max_new_tokens=8, logprobs=2)
    logprobs = answer["logprobs"]
    assert answer["text"] == PROMPT + text(url, max_new_tokens=8)
    assert len(logprobs["tokens"]) == answer["usage"]["total_tokens"]
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"][1:])
    assert "".join(logprobs["tokens"]).endswith(text(url, max_new_tokens=8))
    streamed = stream(url, prompt=PROMPT, echo=True, temperature=0, max_new_tokens=8, logprobs=2)
    assert streamed[-1]["logprobs"]["tokens"] == logprobs["tokens"]


def test_context_overflow_comes_with_the_numbers_and_the_rest_of_the_context_can_be_filled(url: str) -> None:
    length = httpx.post(f"{url}/model_details", trust_env=False).json()["context_length"]
    (frame,) = stream(url, prompt="word " * 3 * length)
    assert frame["error_code"] == 40303
    assert str(length) in frame["text"]
    almost_full = "a" + " a" * (length - 10)
    full = generate(url, prompt=almost_full, max_new_tokens=10**6, ignore_eos=True, echo=False)
    assert full["usage"] == {"prompt_tokens": length - 9, "completion_tokens": 9, "total_tokens": length}


def test_what_vllm_0_6_6_does_not_take_is_the_protocols_error(url: str) -> None:
    answer = generate(url, prompt=PROMPT, repetition_penalty=2.5)
    assert (answer["error_code"], "repetition_penalty" in answer["text"]) == (40302, True)
    embedding = httpx.post(f"{url}/worker_get_embeddings", json={"input": ["a"]}, trust_env=False).json()
    assert (embedding["error_code"], "workers.hf_worker" in embedding["text"]) == (40302, True)


def test_concurrent_streams_say_what_single_ones_say(url: str) -> None:
    prompts = [PROMPT.replace("itertools.chain", name) for name in ("abs", "json.dumps", "os.makedirs", "sorted")] * 3

    def ask(prompt: str) -> str:
        frames = stream(url, prompt=prompt, temperature=0, max_new_tokens=32, echo=False)
        answer: str = frames[-1]["text"]
        return answer

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == alone
    assert len(set(alone)) == 4


@pytest.mark.runs(
    "make env-ipex-llm",
    ".venv-ipex-llm/bin/python -m ipex_vllm.worker --engine ipex-llm --low-bit sym_int4 --model-path MODEL",
)
@pytest.mark.parametrize("low_bit", CPU_FORMATS)
def test_each_low_bit_format_answers(low_bit: str, tmp_path: Path) -> None:
    with worker(tmp_path / "worker", *ENGINE, "--low-bit", low_bit) as running:
        answer = text(running.url, max_new_tokens=48)
        assert "itera" in answer, answer


def test_a_format_that_ipex_llm_has_for_gpus_only_is_one_line(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "ipex_vllm.worker", *ENGINE, "--low-bit", "fp8_e4m3")
    with Program(tmp_path / "worker", *command) as running:
        assert running.process.wait(120) == 2  # a wrong option; a failed start is 1
        last_line = running.output.splitlines()[-1]
        assert last_line.startswith("error: --low-bit fp8_e4m3: on cpu, --engine ipex-llm has bf16, fp16, fp32, sym_i")


def test_a_killed_worker_leaves_no_process(tmp_path: Path) -> None:
    with worker(tmp_path / "worker", *ENGINE) as running:
        children = running.tree()[1:]
        assert children
        running.process.send_signal(signal.SIGKILL)
        eventually(lambda: not any(child.is_running() for child in children), "its engine's process is gone")


def test_sigterm_under_load_loses_nothing(tmp_path: Path) -> None:
    with worker(tmp_path / "worker", *ENGINE) as running, ThreadPoolExecutor(4) as pool:
        answers = start_streams(running, pool, max_new_tokens=200)
        assert running.stop() == 0
        for answer in answers:
            last = answer.result()[-1]
            assert (last["finish_reason"], last["usage"]["completion_tokens"]) == ("length", 200)


def test_a_dead_engine_process_ends_the_worker_and_its_requests(tmp_path: Path) -> None:
    with worker(tmp_path / "worker", *ENGINE) as running, ThreadPoolExecutor(4) as pool:
        (engine_process,) = [child for child in running.tree()[1:] if is_python(child)]
        answers = start_streams(running, pool, max_new_tokens=1500, count=2)
        engine_process.suspend()
        answers += start_streams(running, pool, max_new_tokens=1500, count=2)  # which no step takes up any more
        engine_process.kill()
        assert [answer.result()[-1]["error_code"] for answer in answers] == [50001] * 4
        assert running.process.wait(60) == 1
        assert "ipex-llm's engine died" in running.output


def start_streams(
    running: Server, pool: ThreadPoolExecutor, max_new_tokens: int, count: int = 4
) -> list[Future[list[dict[str, Any]]]]:
    """Streams of that many tokens, all of which the worker has taken."""
    params = {"prompt": PROMPT, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    before = queue_length(running.url)
    answers = [pool.submit(stream, running.url, **params) for _ in range(count)]
    eventually(lambda: queue_length(running.url) == before + count, "all taken")
    return answers


def queue_length(url: str) -> int:
    length: int = httpx.post(f"{url}/worker_get_status", trust_env=False).json()["queue_length"]
    return length


def is_python(process: psutil.Process) -> bool:
    return "ipex_vllm.worker" in process.cmdline()
