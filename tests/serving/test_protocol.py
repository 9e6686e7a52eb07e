"""Parsing of requests and the content of frames."""

import dataclasses
import json
import math

import pytest

from ipex_vllm.engines.generation import Delta, Generation, InvalidParameter, TokenLogprob
from ipex_vllm.serving.protocol import (
    EmbeddingRequest,
    GenerateRequest,
    Transcript,
    encode_frame,
    error_payload,
    parse_prompt,
)

NAMES = [field.name for cls in (Generation, GenerateRequest) for field in dataclasses.fields(cls)]
ALL_NULL = dict.fromkeys([*NAMES, "best_of", "use_beam_search"])


def test_explicit_nulls_mean_the_defaults() -> None:
    assert GenerateRequest.parse({**ALL_NULL, "prompt": "p"}) == GenerateRequest.parse({"prompt": "p"})


def test_defaults_are_fastchats() -> None:
    request = GenerateRequest.parse({"prompt": "p"})
    generation = request.generation
    assert (generation.temperature, generation.top_p, generation.top_k) == (1.0, 1.0, -1)
    assert generation.max_new_tokens == 256
    assert request.echo, "FastChat's test_throughput leaves echo out and subtracts the prompt's words"


@pytest.mark.parametrize(("stop", "expected"), [("x", ("x",)), (["x", "", "y", "x"], ("x", "y")), ([], ()), ("", ())])
def test_stop_is_a_string_or_a_list(stop: object, expected: tuple[str, ...]) -> None:
    assert GenerateRequest.parse({"prompt": "p", "stop": stop}).generation.stop == expected


def test_stop_token_ids_stay_ids() -> None:
    request = GenerateRequest.parse({"prompt": "p", "stop_token_ids": [2, None]}).generation
    assert (request.stop_token_ids, request.stop) == ((2,), ())


def test_a_tiny_temperature_is_greedy_and_a_zero_top_p_is_legal() -> None:
    request = GenerateRequest.parse({"prompt": "p", "temperature": 1e-6, "top_p": 0, "top_k": 0}).generation
    assert (request.temperature, request.top_k) == (0.0, -1)
    assert 0 < request.top_p < 1e-4


def test_whole_floats_are_integers() -> None:
    assert GenerateRequest.parse({"prompt": "p", "top_k": -1.0, "max_new_tokens": 5.0}).generation.max_new_tokens == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": None},
        {"prompt": 5},
        {"model": 5},
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": True},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 10**400},
        {"top_p": 1.1},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": 2},
        {"presence_penalty": 3},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"max_new_tokens": math.inf},
        {"echo": "yes"},
        {"stop": 5},
        {"stop": ["x", 5]},
        {"stop_token_ids": 2},
        {"stop_token_ids": ["2"]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [True]},
        {"ignore_eos": 1},
        {"logprobs": -1},
        {"logprobs": 21},
        {"logprobs": True},
        {"n": 0},
        {"n": 65},
        {"seed": 1.5},
        {"seed": 2**63},
        {"best_of": 2},
        {"use_beam_search": True},
    ],
    ids=str,
)
def test_a_wrong_parameter_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidParameter, match=next(iter(wrong))) as caught:
        GenerateRequest.parse({"prompt": "p", **wrong})
    assert error_payload(caught.value)["error_code"] == 40302


@pytest.mark.parametrize("body", [None, [], "text", 5])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(InvalidParameter, match="JSON object"):
        GenerateRequest.parse(body)


def test_embedding_requests() -> None:
    assert EmbeddingRequest.parse({"input": "a"}).inputs == ("a",)
    assert EmbeddingRequest.parse({"input": ["a", "b"], "encoding_format": "base64"}).base64
    for wrong in ({}, {"input": []}, {"input": [1]}, {"input": "a", "encoding_format": "hex"}):
        with pytest.raises(InvalidParameter):
            EmbeddingRequest.parse(wrong)


def test_a_prompt_to_count_must_be_there() -> None:
    assert parse_prompt({"prompt": ""}) == ""
    with pytest.raises(InvalidParameter, match="prompt"):
        parse_prompt({})


def test_frames_are_cumulative_and_count_tokens() -> None:
    transcript = Transcript(GenerateRequest.parse({"prompt": "Say:", "echo": True}))
    transcript.add(Delta(" a", 1, 4))
    assert transcript.payload()["text"] == "Say: a"
    assert not transcript.is_finished
    transcript.add(Delta("b", 2, 4, "length"))
    payload = transcript.payload()
    assert payload["text"] == "Say: ab"
    assert payload["finish_reason"] == "length"
    assert payload["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert transcript.is_finished
    assert "logprobs" not in payload
    assert "choices" not in payload


def test_logprobs_have_fastchats_shape() -> None:
    transcript = Transcript(GenerateRequest.parse({"prompt": "ab", "logprobs": 1}))
    prompt = (TokenLogprob("a", None, None), TokenLogprob("b", -2.0, {"c": -0.5, "b": -2.0}))
    transcript.add(Delta("xy", 1, 2, None, (*prompt, TokenLogprob("xy", -0.25, {"xy": -0.25}))))
    transcript.add(Delta("z", 1, 2, "stop", (TokenLogprob("z", -1.0, {"z": -1.0}),)))
    assert transcript.payload()["logprobs"] == {
        "text_offset": [0, 1, 2, 4],
        "token_logprobs": [None, -2.0, -0.25, -1.0],
        "tokens": ["a", "b", "xy", "z"],
        "top_logprobs": [None, {"c": -0.5, "b": -2.0}, {"xy": -0.25}, {"z": -1.0}],
    }


def test_no_number_is_written_that_json_has_not() -> None:
    # --logprobs-mode processed_logprobs: what top_k ruled out has no probability.
    transcript = Transcript(GenerateRequest.parse({"prompt": "p", "logprobs": 2}))
    logprobs = (TokenLogprob("a", 0.0, {"a": 0.0, "b": -math.inf}), TokenLogprob("b", -math.inf, {"c": math.nan}))
    transcript.add(Delta("ab", 2, 1, "stop", logprobs))
    frame = encode_frame(transcript.payload()).rstrip(b"\0")
    payload = json.loads(frame, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert payload["logprobs"]["token_logprobs"] == [0.0, -9999.0]
    assert payload["logprobs"]["top_logprobs"] == [{"a": 0.0, "b": -9999.0}, {"c": None}]


def test_several_choices_finish_together() -> None:
    transcript = Transcript(GenerateRequest.parse({"prompt": "p", "echo": False, "n": 2}))
    transcript.add(Delta("a", 1, 1, "stop", index=0))
    assert transcript.payload()["finish_reason"] is None, "a reason would tell clients that nothing follows"
    transcript.add(Delta("b", 1, 1, "length", index=1))
    payload = transcript.payload()
    assert payload["finish_reason"] == "stop"
    assert [(choice["text"], choice["finish_reason"]) for choice in payload["choices"]] == [
        ("a", "stop"),
        ("b", "length"),
    ]
