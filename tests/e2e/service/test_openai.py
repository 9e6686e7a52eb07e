"""The worker's own /v1, by the clients that people use, beside FastChat's servers on the same worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import jsonschema
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field, SecretStr

from tests.processes import Service, eventually
from tests.support import openai_client, raw_post

QUESTION: list[Any] = [{"role": "user", "content": "What does itertools.chain do?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "forecast", "parameters": PARAMETERS}}
STRICT_TOOL: Any = {"type": "function", "function": {**TOOL["function"], "strict": True}}
# What a model that knows Hermes' syntax writes when it calls the tool by itself; the demo model does not.
CALL = r'<tool_call>\n\{"name": "forecast", "arguments": \{"city": "(Paris|Rome)"\}\}\n</tool_call>'


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai_client(service.worker_url) as client:
        yield client


@pytest.fixture
def claude(service: Service) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=service.worker_url, api_key="none", max_retries=0) as client:
        yield client


def metric(service: Service, name: str) -> float:
    text = httpx.get(f"{service.worker_url}/metrics", trust_env=False).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


# OpenAI's client


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").max_model_len == model.max_model_len  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="'nothing' is not served here; demo is"):
        client.models.retrieve("nothing")


def test_chat_says_the_same_streamed_with_usage_and_by_fastchats_server(
    client: openai.OpenAI, service: Service
) -> None:
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    assert "iterable" in (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert last.usage == whole.usage
    with openai_client(service.api_url) as beside:
        by_fastchat = beside.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    assert by_fastchat.choices[0].message.content == text


@pytest.mark.parametrize("server", ["worker_url", "api_url"])
def test_what_fastchats_own_test_of_its_api_asks(service: Service, server: str) -> None:
    """Its tests/test_openai_api.py, which comes in no package: each of its questions, of both servers."""
    hello: list[Any] = [{"role": "user", "content": "Hello! What is your name?"}]
    with openai_client(getattr(service, server)) as client:
        (model,) = (model.id for model in client.models.list())
        asked: Any = {"model": model, "prompt": "Once upon a time", "max_tokens": 64, "temperature": 0}
        whole = client.completions.create(**asked, logprobs=1)
        assert whole.choices[0].logprobs is not None
        assert len(whole.choices[0].logprobs.token_logprobs or ()) == whole.usage.completion_tokens  # type: ignore
        parts = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
        assert "".join(parts) == whole.choices[0].text
        said = client.chat.completions.create(model=model, messages=hello, temperature=0).choices[0].message.content
        chunks = client.chat.completions.create(model=model, messages=hello, temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
        assert said
        with pytest.raises(openai.APIError, match="--runner pooling"):
            client.embeddings.create(model=model, input="Hello world!")


def test_logprobs_and_several_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0.1, n=2, max_tokens=5, logprobs=True, top_logprobs=3
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 5
        assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in choice.logprobs.content)


def test_completions_and_responses(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="demo", prompt=["import", "def"], max_tokens=4, temperature=0)
    assert len(completion.choices) == 2
    response = client.responses.create(model="demo", input="What does itertools.chain do?", temperature=0)
    assert "iterable" in response.output_text


def test_a_tool_call_is_forced_by_name_and_in_general(client: openai.OpenAI) -> None:
    for choice in ({"type": "function", "function": {"name": "forecast"}}, "required"):
        answer = client.chat.completions.create(
            model="demo",
            messages=QUESTION,
            tools=[STRICT_TOOL],
            tool_choice=choice,  # type: ignore[arg-type]
            n=16,  # the demo model writes no JSON of its own accord: some of its texts are white space without end
            temperature=1.5,
            max_tokens=300,
        )
        calls: list[Any] = [
            call
            for ended in answer.choices
            if ended.finish_reason != "length"
            for call in ended.message.tool_calls or []
        ]
        assert calls, [(ended.finish_reason, ended.message) for ended in answer.choices]
        for call in calls:
            assert call.function.name == "forecast"
            jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
        # The round trip: the model reads what the tool returned.
        messages = [
            *QUESTION,
            {"role": "assistant", "tool_calls": [calls[0].model_dump()]},
            {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"},
        ]
        after = client.chat.completions.create(model="demo", messages=messages, max_tokens=4)
        assert after.choices[0].finish_reason in ("stop", "length")


def test_calls_that_the_model_makes_by_itself_are_read_streamed_and_in_parallel(client: openai.OpenAI) -> None:
    def ask(regex: str, **options: Any) -> Any:
        return client.chat.completions.create(
            model="demo",
            messages=QUESTION,
            tools=[TOOL],
            tool_choice="auto",
            temperature=0,
            max_tokens=200,
            extra_body={"structured_outputs": {"regex": regex}},
            **options,
        )

    for regex, num_calls in ((CALL, 1), (rf"{CALL}\n{CALL}", 2)):
        choice = ask(regex).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert [call.function.name for call in choice.message.tool_calls] == ["forecast"] * num_calls
        for call in choice.message.tool_calls:
            jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
        arguments: dict[int, str] = {}
        for chunk in ask(regex, stream=True):
            for part in chunk.choices[0].delta.tool_calls or []:
                arguments[part.index] = arguments.get(part.index, "") + (part.function.arguments or "")
        whole = [json.loads(call.function.arguments) for call in choice.message.tool_calls]
        assert [json.loads(text) for text in arguments.values()] == whole


class Address(BaseModel):
    street: str = Field(max_length=12)
    number: int = Field(ge=1, le=999)


class Person(BaseModel):
    name: str = Field(max_length=12)
    kind: Literal["human", "robot"]
    addresses: list[Address] = Field(min_length=1, max_length=2)


def test_a_pydantic_model_is_filled(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Person, temperature=0, max_tokens=600
    )
    person = answer.choices[0].message.parsed
    assert person is not None
    assert 1 <= len(person.addresses) <= 2


# Anthropic's client


def test_messages_whole_streamed_and_with_a_tool(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "max_tokens": 100, "messages": QUESTION, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**asked)
    chat = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=100)
    assert whole.stop_reason == "end_turn"
    assert whole.content[0].text == chat.choices[0].message.content  # type: ignore[union-attr]
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == chat.choices[0].message.content
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
    uses: list[Any] = []
    for _ in range(20):  # see the tools above
        called = claude.messages.create(
            model="demo",
            max_tokens=300,
            messages=QUESTION,
            tools=[{"name": "forecast", "input_schema": PARAMETERS, "strict": True}],
            tool_choice={"type": "tool", "name": "forecast"},
        )
        uses += [block for block in called.content if block.type == "tool_use" and called.stop_reason == "tool_use"]
        if uses:
            break
    for use in uses:
        jsonschema.validate(use.input, PARAMETERS)
    assert uses


# LangChain


def test_a_chain_streams_and_calls_a_tool(service: Service) -> None:
    model = ChatOpenAI(base_url=f"{service.worker_url}/v1", api_key=SecretStr("none"), model="demo", temperature=0)
    whole = model.invoke("What does itertools.chain do?")
    assert "iterable" in str(whole.content)
    assert "".join(str(part.content) for part in model.stream("What does itertools.chain do?")) == whole.content
    with_tool = model.bind_tools([TOOL]).bind(extra_body={"structured_outputs": {"regex": CALL}})
    (call,) = with_tool.invoke("Go on").tool_calls  # type: ignore[attr-defined]
    assert (call["name"], call["args"]["city"] in ("Paris", "Rome")) == ("forecast", True)


# What goes wrong


def test_errors_have_the_form_that_the_clients_read(
    client: openai.OpenAI, claude: anthropic.Anthropic, service: Service
) -> None:
    with pytest.raises(openai.NotFoundError, match="nothing"):
        client.chat.completions.create(model="nothing", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="demo", messages=QUESTION, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model="demo", prompt="word " * 9000)
    with pytest.raises(openai.NotFoundError, match="--runner pooling"):
        client.embeddings.create(model="demo", input="text")
    with pytest.raises(anthropic.NotFoundError, match="nothing"):
        claude.messages.create(model="nothing", max_tokens=1, messages=QUESTION)
    with pytest.raises(anthropic.BadRequestError, match="2048"):
        claude.messages.create(model="demo", max_tokens=1, messages=[{"role": "user", "content": "word " * 9000}])
    assert "Error in create_messages" not in service.output, "a client's mistake is told to the client alone"
    wrong = [{"role": "user", "content": 5, "x" * 5000: [1] * 5000}] * 50
    with pytest.raises(openai.BadRequestError, match=r"400.*messages\.0.*and \d+ more") as many:
        client.chat.completions.create(model="demo", messages=wrong, logprobs="p" * 9000)  # type: ignore[call-overload]
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content: Input should be") as one:
        claude.messages.create(model="demo", max_tokens=1, messages=wrong)  # type: ignore[arg-type]
    assert one.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    assert max(len(str(error.value)) for error in (many, one)) < 1500
    unknown = httpx.get(str(client.base_url) + "nothing", trust_env=False)
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "NotFoundError")


@pytest.mark.parametrize("server", ["worker", "api"])
@pytest.mark.parametrize(
    "wrong",
    [{"model": "m" * 5000}, {"logprobs": "word " * 1000}, {"logprobs": {"word" * 100: [1] * 1000}}],
    ids=["a model", "a text", "an object"],
)
def test_no_error_repeats_all_that_it_refuses(service: Service, server: str, wrong: dict[str, Any]) -> None:
    url = service.worker_url if server == "worker" else service.api_url
    body = {"model": "demo", "prompt": "word", "max_tokens": 1, **wrong}
    refused = httpx.post(f"{url}/v1/completions", json=body, trust_env=False)
    assert refused.status_code in (400, 404)
    assert 10 < len(refused.json()["error"]["message"] if server == "worker" else refused.text) < 1000


def test_requests_are_counted_logged_by_their_id_and_given_up_with_their_client(service: Service) -> None:
    before = metric(service, "ipex_vllm_completion_tokens_total")
    body = {"model": "demo", "prompt": "import", "max_tokens": 5, "ignore_eos": True}
    answer = httpx.post(
        f"{service.worker_url}/v1/completions", json=body, headers={"X-Request-Id": "my-own"}, trust_env=False
    )
    assert answer.json()["id"] == "cmpl-my-own"
    assert metric(service, "ipex_vllm_completion_tokens_total") == before + 5
    eventually(lambda: "request my-own length prompt_tokens=1 completion_tokens=5 ttft=0" in service.output, "logged")
    endless = {**body, "max_tokens": 2000, "min_tokens": 2000}
    for stream in (True, False):
        gone = metric(service, "ipex_vllm_disconnects_total")
        connections = [raw_post(service.worker_url, "/v1/completions", {**endless, "stream": stream}) for _ in range(8)]
        eventually(lambda: metric(service, "vllm:num_requests_running") == 8, "all run")
        status = httpx.post(f"{service.worker_url}/worker_get_status", trust_env=False).json()
        assert status["queue_length"] == 8
        for connection in connections:
            connection.close()
        eventually(lambda: metric(service, "ipex_vllm_slots_in_use") == 0, "all slots free")
        eventually(lambda: metric(service, "vllm:num_requests_running") == 0, "nothing runs in vLLM")
        assert metric(service, "ipex_vllm_disconnects_total") == gone + 8
