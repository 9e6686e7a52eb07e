"""`make serve` as a user has it: the demo model behind FastChat's own controller, API server and scripts."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import ROOT, Service, eventually
from tests.support import generate, openai_client, raw_post, stream

QUESTION = "What does itertools.chain do?"
# What Prometheus appends to a family's name, by the family's type.
SUFFIXES = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai_client(service.api_url) as client:
        yield client


def chat_prompt(service: Service, question: str) -> str:
    conv = httpx.post(f"{service.worker_url}/worker_get_conv_template", trust_env=False).json()["conv"]
    user, assistant = conv["roles"]
    return f"{user}{question}{conv['sep']}{assistant}"


def run_fastchat(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# The two commands of the README


def test_the_curl_that_is_printed_gets_a_right_answer(service: Service) -> None:
    printed = re.search(r"curl (\S+) -H '([^']+)' .*?-d '(.+?)'\n", service.output, re.DOTALL)
    assert printed is not None
    answer = subprocess.run(
        ["curl", "--silent", printed[1], "-H", printed[2], "-d", printed[3]], capture_output=True, check=True
    )
    content = json.loads(answer.stdout)["choices"][0]["message"]["content"]
    assert "iterable" in content, content


def test_progress_is_shown_and_each_decision_has_a_reason(service: Service) -> None:
    output = service.output
    assert "Loading safetensors" in output
    for decision in ("machine: ", "cores: ", "preload: ", "KV cache: ", "mode: "):
        assert decision in output


# FastChat's programs and the openai client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["demo"]


def test_every_listening_socket_is_on_loopback_unless_asked(service: Service) -> None:
    assert service.listening_at() == {"127.0.0.1"}


def test_chat_streamed_and_not(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    whole = client.chat.completions.create(model="demo", messages=messages, temperature=0)  # type: ignore[call-overload]
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens > 3
    parts = client.chat.completions.create(  # type: ignore[call-overload]
        model="demo", messages=messages, temperature=0, stream=True
    )
    chunks = [chunk.choices[0] for chunk in parts]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].finish_reason == "stop"


def test_completion_with_stop_echo_and_logprobs(client: openai.OpenAI, service: Service) -> None:
    prompt = chat_prompt(service, QUESTION)
    plain = client.completions.create(model="demo", prompt=prompt, max_tokens=8, temperature=0)
    text = plain.choices[0].text
    assert plain.choices[0].finish_reason == "length"
    stopped = client.completions.create(model="demo", prompt=prompt, max_tokens=8, temperature=0, stop=text[6:9])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (text[:6], "stop")
    echoed = client.completions.create(
        model="demo", prompt=prompt, max_tokens=8, temperature=0, echo=True, logprobs=2, n=2
    )
    assert [choice.text for choice in echoed.choices] == [prompt + text] * 2
    logprobs = echoed.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == echoed.usage.total_tokens // 2  # type: ignore[union-attr]
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])
    assert "".join(logprobs.tokens).endswith(text)


def test_a_completion_is_streamed_by_the_api_server(client: openai.OpenAI) -> None:
    parts = client.completions.create(model="demo", prompt="import", max_tokens=20, temperature=0, stream=True)
    whole = client.completions.create(model="demo", prompt="import", max_tokens=20, temperature=0)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_an_error_reaches_the_openai_client_in_words(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.completions.create(model="demo", prompt="p", best_of=3)


def test_fastchats_test_message(service: Service) -> None:
    out = run_fastchat(
        "fastchat.serve.test_message", "--controller-address", service.controller_url, "--model-name", "demo"
    )
    assert "Models: ['demo']" in out
    assert len(out.splitlines()[-1]) > len("Assistant: ")


def test_fastchats_test_throughput(service: Service) -> None:
    out = run_fastchat(
        "fastchat.serve.test_throughput",
        *("--controller-address", service.controller_url, "--model-name", "demo"),
        *("--n-thread", "8", "--max-new-tokens", "32"),
    )
    assert "words/s" in out


def test_the_dashboard_asks_for_what_a_worker_exposes(service: Service) -> None:
    families = text_string_to_metric_families(httpx.get(f"{service.worker_url}/metrics", trust_env=False).text)
    exposed = {family.name + suffix for family in families for suffix in SUFFIXES.get(family.type, ())}
    panels = json.loads((ROOT / "docs/deploy/grafana.json").read_text())["panels"]
    assert len(panels) > 10
    for panel in panels:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            asked = set(re.findall(r"\b(?:ipex_vllm_|vllm:)\w+", target["expr"]))
            assert asked, target["expr"]
            assert asked <= exposed, panel["title"]


# The engine, through the worker


def test_concurrent_streams_say_what_single_ones_say(service: Service) -> None:
    questions = [f"What does {name} do?" for name in ("os.makedirs", "json.dumps", "itertools.chain", "abs")]
    prompts = [chat_prompt(service, f"{question}{' ' * (i // 4)}") for i, question in enumerate(questions * 8)]

    def ask(prompt: str) -> str:
        frames = stream(service.worker_url, prompt=prompt, temperature=0, max_new_tokens=48, echo=False)
        text: str = frames[-1]["text"]
        return text

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, prompts))
    assert together == alone
    assert len(set(alone)) > 3


def test_a_storm_of_disconnects_leaves_room_for_a_full_batch(service: Service) -> None:
    for _ in range(5):
        connections = [
            raw_post(service.worker_url, "/worker_generate_stream", {"prompt": "def", "max_new_tokens": 2000})
            for _ in range(40)
        ]
        for connection in connections:
            connection.recv(1)  # it runs
            connection.close()

    def metric(name: str) -> float:
        text = httpx.get(f"{service.worker_url}/metrics", trust_env=False).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    eventually(lambda: metric("ipex_vllm_slots_in_use") == 0, "all slots free")
    eventually(lambda: metric("vllm:num_requests_running") == 0, "nothing runs in vLLM")
    eventually(lambda: metric("vllm:kv_cache_usage_perc") == 0, "all KV blocks free")
    with ThreadPoolExecutor(32) as pool:
        answers = list(
            pool.map(
                lambda _: generate(service.worker_url, prompt="import", max_new_tokens=16, ignore_eos=True), range(32)
            )
        )
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [16] * 32


def test_stop_token_ids_stop_and_literal_text_does_not(service: Service) -> None:
    url, prompt = service.worker_url, chat_prompt(service, QUESTION)
    free = generate(url, prompt=prompt, echo=False, temperature=0, logprobs=0, max_new_tokens=8)
    second = free["logprobs"]["tokens"][1]
    tokenized = httpx.post(f"{url}/count_token", json={"prompt": second}, trust_env=False).json()
    assert tokenized == {"count": 1, "error_code": 0}
    stopped = generate(url, prompt=prompt, echo=False, temperature=0, max_new_tokens=8, stop=second)
    assert stopped["text"] == free["logprobs"]["tokens"][0]
    past_eos = generate(url, prompt=prompt, echo=False, temperature=0, max_new_tokens=200, ignore_eos=True)
    assert past_eos["usage"]["completion_tokens"] == 200
    assert past_eos["finish_reason"] == "length"


def test_context_overflow_comes_before_generation_with_the_numbers(service: Service) -> None:
    length = httpx.post(f"{service.worker_url}/model_details", trust_env=False).json()["context_length"]
    (frame,) = stream(service.worker_url, prompt="word " * 3 * length)
    assert frame["error_code"] == 40303
    assert str(length) in frame["text"]
    full = generate(service.worker_url, prompt="import", max_new_tokens=10**6, ignore_eos=True, echo=False)
    assert full["usage"]["total_tokens"] == length


def test_the_worker_answers_polls_while_it_counts_a_long_prompt(service: Service) -> None:
    url = service.worker_url
    body = {"prompt": "def spam(): " * 9000}
    with ThreadPoolExecutor(1) as pool:
        counting = pool.submit(httpx.post, f"{url}/count_token", json=body, timeout=60, trust_env=False)
        polls = 0
        while not counting.done():
            assert httpx.post(f"{url}/worker_get_status", timeout=5, trust_env=False).is_success
            polls += 1
        # What cannot fit is counted until that is sure, and refused.
        answer = counting.result().json()
        assert (answer["error_code"], answer["count"] > 2048) == (40303, True)
        assert polls > 0


def test_a_conversation_with_an_empty_system_message_is_the_models_own(service: Service) -> None:
    conv = httpx.post(f"{service.worker_url}/worker_get_conv_template", trust_env=False).json()["conv"]
    plain = chat_prompt(service, QUESTION)
    empty = conv["system_template"].format(system_message="") + plain
    answers = [generate(service.worker_url, prompt=p, temperature=0, echo=False) for p in (plain, empty)]
    assert answers[0] == answers[1]


# The parts may die


def test_a_controller_that_dies_is_back_with_its_worker(service: Service) -> None:
    service.process_of("fastchat.serve.controller").kill()
    eventually(lambda: service.models() == [], "gone")
    eventually(lambda: service.models() == ["demo"], "the worker registered again")


def test_a_worker_that_dies_is_started_again(service: Service) -> None:
    old = service.process_of("ipex_vllm.worker")
    children = old.children(recursive=True)
    old.kill()
    eventually(lambda: not any(child.is_running() for child in children), "its engine's processes are gone")
    eventually(lambda: service.models() == ["demo"] and is_ready(service), "a new one", timeout_s=180)
    assert generate(service.worker_url, prompt="import", max_new_tokens=2)["error_code"] == 0


def is_ready(service: Service) -> bool:
    try:
        return httpx.get(f"{service.worker_url}/ready", trust_env=False).is_success
    except httpx.HTTPError:
        return False
