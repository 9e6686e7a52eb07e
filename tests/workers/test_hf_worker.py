"""The Transformers engine behind the real server, on the demo model; Transformers itself and vLLM are the oracles."""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.engines.generation import Generation
from ipex_vllm.errors import EngineError, OneLine, OptionError
from ipex_vllm.low_bit.hf import HfLowBitLinear
from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan import cpu
from tests.processes import Server, eventually
from tests.support import generate, make_server, serving, stream
from workers import hf_engine, hf_generation, hf_ipex
from workers.hf_engine import HfEngine, embedding_batches
from workers.hf_generation import logits_processors

PROMPT = "import json\n\ndef load(path):\n"
QUESTIONS = [
    f"<|im_start|>user\n{json.loads(line)['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    for line in (MODEL_DIR.parent / "evaluation.jsonl").read_text().splitlines()
]


def start(model: Path = MODEL_DIR, **options: Any) -> HfEngine:
    """An engine in float32, where texts do not depend on how a prompt is split."""
    arguments = {name: options.pop(name) for name in ("max_model_len", "ipex") if name in options}
    worker_options = WorkerOptions(model_path=str(model), **{"low_bit": "fp32", **options})
    parser = argparse.ArgumentParser()
    HfEngine.add_arguments(parser)
    args = parser.parse_args([], argparse.Namespace(**arguments))
    HfEngine.check(worker_options, args)
    plan = cpu.choose(MachineFacts.probe(), worker_options, ModelFacts.read(str(model)), HfEngine.demands(args))
    return asyncio.run(HfEngine.start(replace(plan, engine_args=args)))


@pytest.fixture(scope="module")
def engine() -> Iterator[HfEngine]:
    engine = start()
    yield engine
    asyncio.run(engine.stop())


@pytest.fixture(scope="module")
def url(engine: HfEngine) -> Iterator[str]:
    with serving(make_server(engine)) as url:
        yield url


class ForwardPasses:
    """Counts the model's forward passes; `on_pass` is called before each."""

    def __init__(self, engine: HfEngine, on_pass: Callable[[], None] = lambda: None) -> None:
        self.num = 0
        self._on_pass = on_pass
        self.handle = engine._model.base_model.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.num += 1
        self._on_pass()


@pytest.fixture
def forward_passes(engine: HfEngine) -> Iterator[ForwardPasses]:
    counter = ForwardPasses(engine)
    yield counter
    counter.handle.remove()


def reference(engine: HfEngine, num_tokens: int) -> list[int]:
    """The greedy tokens after PROMPT, by Transformers alone."""
    inputs = engine.tokenizer(PROMPT, return_tensors="pt")
    output = engine._model.generate(**inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens)[0]
    token_ids: list[int] = output[inputs["input_ids"].shape[1] :].tolist()
    return token_ids


def greedy(url: str, prompt: str = PROMPT, **params: Any) -> dict[str, Any]:
    return generate(url, prompt=prompt, temperature=0, echo=False, **params)


def test_greedy_text_is_transformers_own_with_usage_in_tokens(engine: HfEngine, url: str) -> None:
    answer = greedy(url, max_new_tokens=40, ignore_eos=True)
    assert answer["text"] == engine.tokenizer.decode(reference(engine, 40), skip_special_tokens=True)
    assert answer["finish_reason"] == "length"
    prompt_tokens = len(engine.tokenizer(PROMPT)["input_ids"])
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 40,
        "total_tokens": prompt_tokens + 40,
    }


async def test_what_the_drain_cuts_off_is_an_error_and_not_half_a_text(engine: HfEngine) -> None:
    server = make_server(engine)
    body = {"prompt": PROMPT, "max_new_tokens": 1500, "ignore_eos": True}
    async with aclosing(server.frames(body, "id")) as frames:
        assert (await anext(frames))["error_code"] == 0
        draining = asyncio.create_task(server.core.drain(0))
        last = [frame async for frame in frames][-1]
        await draining
    assert last["error_code"] == 42903
    assert server.core.slots.queue_length == 0


def test_a_stream_grows_to_the_same_text(url: str) -> None:
    params = {"prompt": PROMPT, "temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    frames = stream(url, **params)
    texts = [frame["text"] for frame in frames]
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert texts[-1] == generate(url, **params)["text"]
    assert [frame["finish_reason"] for frame in frames[-2:]] == [None, "length"]


@pytest.mark.parametrize("low_bit", ["fp32", "sym_int8"])
def test_a_model_that_lacks_a_tensor_is_not_served(low_bit: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"lacks 1 of the model's tensors: model\.norm\.weight"):
        start(model, low_bit=low_bit)


def test_the_end_of_a_turn_ends_the_text_unless_it_is_ignored(url: str) -> None:
    answer = greedy(url, QUESTIONS[0], max_new_tokens=60)
    assert answer["finish_reason"] == "stop"
    assert "<|im_end|>" not in answer["text"]
    ignored = greedy(url, QUESTIONS[0], max_new_tokens=60, ignore_eos=True)
    assert (ignored["finish_reason"], ignored["usage"]["completion_tokens"]) == ("length", 60)
    assert ignored["text"].startswith(answer["text"])


def test_a_stop_string_ends_the_text_before_it_and_generation_with_it(url: str, forward_passes: ForwardPasses) -> None:
    text = greedy(url, max_new_tokens=40)["text"]
    start = len(text) // 2
    stop = text[start : start + 7]
    forward_passes.num = 0
    answer = greedy(url, max_new_tokens=40, stop=["not there", stop])
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == forward_passes.num < 40


def test_text_that_only_starts_a_stop_string_is_not_lost(url: str) -> None:
    text = greedy(url, max_new_tokens=40)["text"]
    assert greedy(url, max_new_tokens=40, stop=text[-5:] + "!")["text"] == text


def test_stop_token_ids_stop_and_the_token_is_not_shown(engine: HfEngine, url: str) -> None:
    token_ids = reference(engine, 40)
    position = next(place for place in range(8, 40) if token_ids[place] not in token_ids[:place])
    answer = greedy(url, max_new_tokens=40, stop_token_ids=[token_ids[position]])
    assert answer["text"] == engine.tokenizer.decode(token_ids[:position])
    assert (answer["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", position + 1)


def test_logprobs_are_the_models_own_and_echo_adds_the_prompts(engine: HfEngine, url: str) -> None:
    penalty = {"repetition_penalty": 1.3}  # log probabilities are taken before any penalty
    answer = generate(url, prompt=PROMPT, temperature=0, max_new_tokens=6, logprobs=3, **penalty)
    token_ids = engine.tokenizer(answer["text"], return_tensors="pt")["input_ids"]
    expected = engine._model(token_ids).logits[0].log_softmax(dim=-1).detach()
    logprobs = answer["logprobs"]
    assert "".join(logprobs["tokens"]) == answer["text"]
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    for position, token_id in enumerate(token_ids[0].tolist()[1:], 1):
        chosen = expected[position - 1, token_id].item()
        assert logprobs["token_logprobs"][position] == pytest.approx(chosen, abs=1e-3)
        values, ids = expected[position - 1].topk(3)
        top = {engine.tokenizer.decode([top_id]): value for top_id, value in zip(ids, values.tolist(), strict=True)}
        top |= {engine.tokenizer.decode([token_id]): chosen}
        assert logprobs["top_logprobs"][position] == pytest.approx(top, abs=1e-3)


def test_without_echo_logprobs_are_the_completions(url: str) -> None:
    answer = greedy(url, max_new_tokens=6, logprobs=0)
    assert "".join(answer["logprobs"]["tokens"]) == answer["text"]
    assert [len(top) for top in answer["logprobs"]["top_logprobs"]] == [1] * 6


def test_a_long_prompt_is_computed_in_parts_with_the_same_result(
    url: str, monkeypatch: pytest.MonkeyPatch, forward_passes: ForwardPasses
) -> None:
    params: dict[str, Any] = {"max_new_tokens": 10, "logprobs": 2}
    whole, whole_echo = greedy(url, **params), generate(url, prompt=PROMPT, temperature=0, **params)
    monkeypatch.setattr(hf_generation, "PREFILL_CHUNK_TOKENS", 3)
    forward_passes.num = 0
    split = greedy(url, **params)
    assert forward_passes.num >= split["usage"]["prompt_tokens"] // 3 + 9
    split_echo = generate(url, prompt=PROMPT, temperature=0, **params)
    for answer, same in ((whole, split), (whole_echo, split_echo)):
        assert answer["text"] == same["text"]
        for name in ("token_logprobs", "tokens"):
            assert same["logprobs"][name][1:] == pytest.approx(answer["logprobs"][name][1:], abs=1e-3)


def test_penalties_are_vllms() -> None:
    from vllm.model_executor.layers.utils import apply_penalties

    torch.manual_seed(0)
    prompt, completion = torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (2, 30))
    logits = torch.randn(2, 50) * 4
    request = Generation(prompt="", temperature=0, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=-0.4)
    scores = logits
    for processor in logits_processors(request, prompt_tokens=9):
        scores = processor(torch.cat([prompt, completion], dim=1), scores)
    presence, frequency, repetition = (torch.full((2,), value) for value in (-0.4, 0.7, 1.3))
    expected = apply_penalties(logits.clone(), prompt, completion, presence, frequency, repetition)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (-1, 0.6), (12, 0.5)])
def test_top_k_and_top_p_keep_vllms_tokens(top_k: int, top_p: float) -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    torch.manual_seed(0)
    logits = torch.randn(4, 200) * 3
    request = Generation(prompt="", temperature=0.7, top_k=top_k, top_p=top_p)
    scores = logits
    for processor in logits_processors(request, prompt_tokens=0):
        scores = processor(torch.zeros(4, 0, dtype=torch.long), scores)
    expected = apply_top_k_top_p(
        logits / 0.7,
        torch.full((4,), top_k) if top_k > 0 else None,
        torch.full((4,), top_p) if top_p < 1 else None,
    )
    torch.testing.assert_close(scores, expected)


def test_min_p_keeps_tokens_by_their_share_of_the_likeliest() -> None:
    request = Generation(prompt="", min_p=0.3)
    (processor,) = logits_processors(request, prompt_tokens=0)
    probabilities = torch.tensor([[0.5, 0.2, 0.14, 0.16]])
    kept = processor(torch.zeros(1, 0, dtype=torch.long), probabilities.log()).isfinite()
    assert kept.tolist() == [[True, True, False, True]]


def test_a_seed_gives_the_same_text_again_and_none_another(url: str) -> None:
    params = {"prompt": PROMPT, "max_new_tokens": 20, "temperature": 1.5, "ignore_eos": True}
    seeded = [generate(url, seed=seed, **params)["text"] for seed in (1, 1, -7, 2**70)]
    assert seeded[0] == seeded[1]
    assert len({*seeded, *(generate(url, **params)["text"] for _ in range(2))}) == 5


def test_choices_differ_when_sampled_and_each_is_the_greedy_one_otherwise(
    url: str, forward_passes: ForwardPasses
) -> None:
    params: dict[str, Any] = {"prompt": PROMPT, "max_new_tokens": 12, "echo": False, "n": 3}
    sampled = generate(url, temperature=1.5, seed=0, ignore_eos=True, **params)
    assert len({choice["text"] for choice in sampled["choices"]}) == 3
    assert sampled["usage"]["completion_tokens"] == 36
    forward_passes.num = 0
    alike = generate(url, temperature=0, logprobs=1, **params)
    assert forward_passes.num == 13  # one for all but the last of the prompt, and all choices at once
    single = greedy(url, max_new_tokens=12, logprobs=1)
    for choice in alike["choices"]:
        assert choice["text"] == single["text"]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(single["logprobs"]["token_logprobs"], abs=1e-3)


def test_one_choice_ends_before_another(url: str) -> None:
    params: dict[str, Any] = {"prompt": PROMPT, "max_new_tokens": 24, "echo": False, "temperature": 1.5, "seed": 5}
    free = generate(url, n=2, ignore_eos=True, **params)
    stop = free["choices"][0]["text"][:30]
    assert stop not in free["choices"][1]["text"]
    stopped = generate(url, n=2, ignore_eos=True, stop=stop, **params)
    assert [choice["finish_reason"] for choice in stopped["choices"]] == ["stop", "length"]
    assert [choice["text"] for choice in stopped["choices"]] == ["", free["choices"][1]["text"]]


def test_the_checkpoints_own_sampling_defaults_stay_out(url: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    settings = {
        "do_sample": True,
        "temperature": 9.0,
        "repetition_penalty": 3.0,
        "max_length": 3,
        "eos_token_id": [2, 9],
    }
    (model / "generation_config.json").write_text(json.dumps(settings))
    engine = start(model)
    assert engine._eos_token_ids == {2, 9}
    with serving(make_server(engine)) as other:
        assert greedy(other, max_new_tokens=30, ignore_eos=True) == greedy(url, max_new_tokens=30, ignore_eos=True)
    asyncio.run(engine.stop())


def test_the_context_bounds_prompt_and_completion() -> None:
    engine = start(max_model_len=32)
    with serving(make_server(engine)) as url:
        assert httpx.post(f"{url}/model_details", trust_env=False).json() == {"context_length": 32}
        answer = greedy(url, max_new_tokens=1000, ignore_eos=True)
        assert (answer["usage"]["total_tokens"], answer["finish_reason"]) == (32, "length")
        overflow = greedy(url, PROMPT * 10)
        assert overflow["error_code"] == 40303
        assert "32" in overflow["text"]
        empty = greedy(url, "")
        assert (empty["error_code"], empty["text"]) == (40302, "The text has no tokens. Send some.")
    asyncio.run(engine.stop())


async def read_then_leave(engine: HfEngine, num_deltas: int, **params: Any) -> None:
    request = Generation(prompt=PROMPT, ignore_eos=True, **params)
    async with aclosing(engine.stream(request, "leaves")) as deltas:
        for _ in range(num_deltas):
            await anext(deltas)


def wait_idle(engine: HfEngine) -> None:
    engine._thread.submit(lambda: None).result()


def test_generation_stops_when_the_client_has_gone(engine: HfEngine, forward_passes: ForwardPasses) -> None:
    asyncio.run(read_then_leave(engine, 3, max_new_tokens=1500))
    wait_idle(engine)
    assert forward_passes.num < 200


def test_a_disconnect_over_http_stops_generation(url: str, engine: HfEngine, forward_passes: ForwardPasses) -> None:
    body = {"prompt": PROMPT, "max_new_tokens": 1500, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/worker_generate_stream", json=body, trust_env=False) as response:
        next(response.iter_bytes())
    wait_idle(engine)
    assert forward_passes.num < 1000
    assert httpx.post(f"{url}/worker_get_status", trust_env=False).json()["queue_length"] == 0


def test_a_long_prompt_can_be_left(engine: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_generation, "PREFILL_CHUNK_TOKENS", 1)
    second_pass, client_gone = threading.Event(), threading.Event()

    def on_pass() -> None:
        if passes.num == 2:
            second_pass.set()
            assert client_gone.wait(60)

    async def leave_during_prefill() -> None:
        reading = asyncio.create_task(read_then_leave(engine, 1))
        await asyncio.to_thread(second_pass.wait)
        reading.cancel()
        await asyncio.wait([reading])
        client_gone.set()

    passes = ForwardPasses(engine, on_pass)
    asyncio.run(leave_during_prefill())
    wait_idle(engine)
    passes.handle.remove()
    assert passes.num == 2


def test_a_request_that_is_left_in_the_queue_never_runs(engine: HfEngine, forward_passes: ForwardPasses) -> None:
    may_go_on = threading.Event()
    blocker = engine._thread.submit(may_go_on.wait)

    async def leave_while_waiting() -> None:
        reading = asyncio.create_task(read_then_leave(engine, 1))
        await asyncio.sleep(0.1)
        reading.cancel()
        await asyncio.wait([reading])

    asyncio.run(leave_while_waiting())
    may_go_on.set()
    blocker.result()
    wait_idle(engine)
    assert forward_passes.num == 0


def test_requests_wait_for_each_other_and_all_are_served(url: str) -> None:
    expected = greedy(url, max_new_tokens=10)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: greedy(url, max_new_tokens=10), range(4)))
    assert answers == [expected] * 4


def test_a_failure_of_the_model_is_this_requests_error_only(url: str, engine: HfEngine) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("not enough\nmemory")

    handle = engine._model.base_model.register_forward_pre_hook(fail)
    answer = greedy(url)
    handle.remove()
    assert answer["error_code"] == 50001
    assert "not enough memory" in answer["text"]
    assert greedy(url, max_new_tokens=3)["error_code"] == 0


def embeddings(url: str, texts: list[str], **params: Any) -> dict[str, Any]:
    body = {"model": "fake-model", "input": texts, **params}
    answer: dict[str, Any] = httpx.post(f"{url}/worker_get_embeddings", json=body, timeout=60, trust_env=False).json()
    return answer


TEXTS = ["import os", "A much longer text, with many more tokens than the first one has.", "class A:\n    pass", "x"]


@pytest.mark.parametrize("batch_tokens", [1, 40, 2048])
def test_embeddings_are_normalised_means_whatever_the_batch(
    engine: HfEngine, url: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_engine, "EMBEDDING_BATCH_TOKENS", batch_tokens)
    answer = embeddings(url, TEXTS)
    num_tokens = 0
    for text, vector in zip(TEXTS, answer["embedding"], strict=True):
        inputs = engine.tokenizer(text, return_tensors="pt")
        num_tokens += inputs["input_ids"].numel()
        hidden = engine._model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
        torch.testing.assert_close(torch.tensor(vector), expected.detach(), atol=1e-4, rtol=0)
    assert answer["token_num"] == num_tokens


def test_embeddings_are_batched(url: str, forward_passes: ForwardPasses) -> None:
    embeddings(url, TEXTS * 8)
    assert forward_passes.num == 1


def test_a_batch_holds_inputs_of_like_length_and_no_more_than_its_tokens() -> None:
    lengths = [1500, 3, 700, 4, 700, 2000, 5]
    assert list(embedding_batches(lengths)) == [[1, 3, 6], [2, 4], [0], [5]]


def test_embeddings_in_base64_are_little_endian_floats(url: str) -> None:
    plain = embeddings(url, TEXTS)["embedding"]
    encoded = embeddings(url, TEXTS, encoding_format="base64")["embedding"]
    decoded = [struct.unpack(f"<{len(plain[0])}f", base64.b64decode(text)) for text in encoded]
    assert decoded == [pytest.approx(vector) for vector in plain]


def test_an_input_that_is_too_long_to_embed_is_told(url: str) -> None:
    assert embeddings(url, ["fine", "word " * 3000])["error_code"] == 40303


def test_the_thread_computes_on_the_plans_cores_only() -> None:
    own = os.sched_getaffinity(0)
    every = set(range(os.cpu_count() or 1))
    os.sched_setaffinity(0, every)  # as a server has them, whatever these tests were confined to
    try:
        engine = start(cores="0")
        threads, affinity = engine._thread.submit(lambda: (torch.get_num_threads(), os.sched_getaffinity(0))).result()
        asyncio.run(engine.stop())
        assert (threads, affinity) == (1, {0})
        assert os.sched_getaffinity(0) == every, "the server's threads are free"
    finally:
        os.sched_setaffinity(0, own)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": Path("/nowhere/model")}, "/nowhere/model"),
        (
            {"ipex": True},
            "--ipex: Intel's extension for PyTorch is not installed here .*make env-ipex.*.venv-ipex/bin/python",
        ),
        ({"ipex": True, "device": "xpu"}, "--ipex: on --device cpu only, not on xpu"),
        ({"compile": True}, "--compile: Transformers runs the model eagerly here"),
        ({"low_bit": "sym_int99"}, "--low-bit: low-bit format 'sym_int99' is unknown; use one of sym_int4"),
        ({"upstream_kernels": True}, "--upstream-kernels: vLLM's engine has them"),
        ({"low_bit": "sym_int4", "low_bit_head": "int3"}, "--low-bit: low-bit format 'int3' is unknown"),
        ({"max_model_len": 4096}, "--max-model-len 4096: the model has a context of 2048 tokens"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OneLine, match=says) as caught:
        start(**options)
    assert "\n" not in str(caught.value)


def test_a_format_that_the_extension_lacks_names_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_ipex, "require_ipex", lambda: None)
    with pytest.raises(OptionError, match=r"asym_int4: with --ipex there are bf16, fp32, sym_int8, sym_int4$"):
        start(ipex=True, low_bit="asym_int4")


def test_low_bit_weights_answer_as_the_original_does(url: str) -> None:
    engine = start(low_bit="sym_int8")
    linears = [layer for layer in engine._model.modules() if hasattr(layer, "in_features")]
    assert linears
    assert all(isinstance(layer, (HfLowBitLinear, LowBitLinear)) for layer in linears)
    with serving(make_server(engine)) as low_bit_url:
        for question in QUESTIONS[:3]:
            assert greedy(low_bit_url, question)["text"] == greedy(url, question)["text"]
    asyncio.run(engine.stop())


def test_the_worker_runs_as_a_process_and_drains(tmp_path: Path) -> None:
    command = ("workers.hf_worker", "--model-path", "demo", "--low-bit", "bf16", "--no-register")
    with Server(tmp_path / "hf", "/ready", *command) as worker, ThreadPoolExecutor() as pool:
        answer = pool.submit(stream, worker.url, prompt=PROMPT, max_new_tokens=100, ignore_eos=True)
        eventually(lambda: status(worker.url)["queue_length"] == 1, "the request runs")
        assert worker.stop() == 0
        assert answer.result()[-1]["usage"]["completion_tokens"] == 100


def status(url: str) -> dict[str, Any]:
    payload: dict[str, Any] = httpx.post(f"{url}/worker_get_status", trust_env=False).json()
    return payload
