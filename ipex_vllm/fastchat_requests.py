"""What FastChat's OpenAI API server gets to see of a request: what it would misread is put right or refused.

The server drops what it does not know, reads parts of a message as Python text, and fails with a bare 500 on much that
clients send. Each function here takes a body and returns the one to pass on. Raises BadRequest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ipex_vllm.engines.bounds import MAX_CHOICES
from ipex_vllm.serving.json_bodies import dumps, loads

MAX_ITEMS = 1024  # texts of a request, times its choices: FastChat starts a task or makes two calls for each
# Where a request goes that FastChat's protocol has no room for.
OTHERWISE = "or send the request to the worker's own address, whose /v1 knows it"
SYSTEM_ROLES = ("system", "developer")

# What the server drops and an answer depends on, with the values that ask for nothing. The rest is passed on.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": ({},),
    "chat_template_kwargs": ({},),
    "reasoning_effort": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "min_tokens": (0,),
}
# Of these, what the worker's /v1 takes by another name, and what nothing here does.
RENAMED = {
    "functions": "tools",
    "function_call": "tool_choice",
    **{name: "structured_outputs" for name in NEUTRAL if name.startswith("guided_")},
}
NOWHERE = ("audio", "modalities", "suffix")
CHAT_NEUTRAL = {**NEUTRAL, "logprobs": (False,), "top_logprobs": (0,)}
COMPLETION_NEUTRAL = {**NEUTRAL, "suffix": ("",), "use_beam_search": (False,)}
OWN_CHAT_NEUTRAL = {name: values for name, values in CHAT_NEUTRAL.items() if name != "repetition_penalty"}
EMBEDDING_NEUTRAL: dict[str, tuple[Any, ...]] = {"dimensions": ()}


class BadRequest(Exception):
    """A sentence for the client, and the field that it is about."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def read_body(content: bytes) -> dict[str, Any]:
    """The JSON object of a request, without its nulls: FastChat knows the defaults of what is missing."""
    try:
        body = loads(content)
    except (ValueError, RecursionError) as error:
        raise _no_json(error) from error
    if not isinstance(body, dict):
        raise BadRequest("The request body must be a JSON object.")
    return {name: value for name, value in body.items() if value is not None}


def written(body: dict[str, Any]) -> bytes:
    """The JSON of a body that was read. A large one takes as long to write as to read, so it is written once."""
    try:
        return dumps(body)
    except (ValueError, RecursionError) as error:
        raise _no_json(error) from error


def chat(body: dict[str, Any]) -> dict[str, Any]:
    """A body of /v1/chat/completions."""
    return _chat(body, CHAT_NEUTRAL)


def own_chat(body: dict[str, Any]) -> dict[str, Any]:
    """A body of FastChat's own /api/v1/chat/completions, which takes repetition_penalty."""
    return _chat(body, OWN_CHAT_NEUTRAL)


def completion(body: dict[str, Any]) -> dict[str, Any]:
    """A body of /v1/completions."""
    _refuse_what_is_dropped(body, COMPLETION_NEUTRAL)
    prompts = _texts(body, "prompt")
    num_choices = _num_choices(body, len(prompts))
    if body.get("best_of", 1) != 1 and body["best_of"] != num_choices:
        raise BadRequest("best_of above n is not supported. Leave it out.", "best_of")
    if body.get("stream") and len(prompts) > 1:
        raise BadRequest("A stream takes one prompt: their texts could not be told apart. Send several requests.")
    return {**body, "prompt": prompts}


def embedding(body: dict[str, Any]) -> dict[str, Any]:
    """A body of /v1/embeddings."""
    _refuse_what_is_dropped(body, EMBEDDING_NEUTRAL)
    return {**body, "input": _texts(body, "input")}


def token_check(body: dict[str, Any]) -> dict[str, Any]:
    """A body of /api/v1/token_check."""
    prompts = body.get("prompts")
    if not isinstance(prompts, list) or len(prompts) > MAX_ITEMS:
        raise BadRequest(f"prompts must be a list of at most {MAX_ITEMS}.", "prompts")
    return body


CHECKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "/v1/chat/completions": chat,
    "/api/v1/chat/completions": own_chat,
    "/v1/completions": completion,
    "/v1/embeddings": embedding,
    "/api/v1/token_check": token_check,
}


def check_for(path: str) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """What checks the bodies of an endpoint, or None where there is nothing to check."""
    if path.startswith("/v1/engines/") and path.endswith("/embeddings"):
        return embedding
    return CHECKS.get(path)


def _chat(body: dict[str, Any], neutral: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    _refuse_what_is_dropped(body, neutral)
    _num_choices(body, 1)
    body = dict(body)
    if "max_completion_tokens" in body:  # the newer name
        body.setdefault("max_tokens", body.pop("max_completion_tokens"))
    messages = body.get("messages")
    if isinstance(messages, str):  # FastChat's own: a whole prompt
        return body
    if not isinstance(messages, list) or not messages or len(messages) > MAX_ITEMS:
        raise BadRequest(f"messages must be a list of 1 to {MAX_ITEMS} messages.", "messages")
    checked = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    # FastChat would keep the last system message alone.
    system = "\n\n".join(message["content"] for message in checked if message["role"] == "system")
    others = [message for message in checked if message["role"] != "system"]
    if len(others) < len(checked):
        others.insert(0, {"role": "system", "content": system})
    return {**body, "messages": others}


def _message(message: object, name: str) -> dict[str, str]:
    """A message with its text alone, which is all that FastChat takes."""
    if not isinstance(message, dict):
        raise BadRequest(f"{name} must be an object with role and content.", name)
    role = message.get("role")
    if role not in (*SYSTEM_ROLES, "user", "assistant"):
        raise BadRequest(f"{name}.role must be system, user or assistant, not {_shown(role)}, {OTHERWISE}.", name)
    for field in ("tool_calls", "function_call"):
        if message.get(field):
            raise BadRequest(f"{name}.{field}: FastChat calls no tools. Leave it out, {OTHERWISE}.", name)
    return {"role": "system" if role in SYSTEM_ROLES else role, "content": _content(message.get("content"), name, role)}


def _content(content: object, name: str, role: str) -> str:
    if content is None and role == "assistant":
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{name}.content must be a string or a list of parts.", name)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text":
            told = f"{name}.content: FastChat's API server passes text on, no part of type {_shown(kind)}"
            raise BadRequest(f"{told}. Leave it out, {OTHERWISE}.", name)
        if not isinstance(part.get("text"), str):
            raise BadRequest(f"{name}.content: a part of type 'text' needs its text.", name)
        texts.append(part["text"])
    return "\n".join(texts)


def _texts(body: dict[str, Any], name: str) -> list[str]:
    value = body.get(name)
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and isinstance(texts[0], (int, list)) and not isinstance(texts[0], bool):
        raise BadRequest(f"{name} as token ids is not supported by FastChat: send text, {OTHERWISE}.", name)
    if not isinstance(texts, list) or not 0 < len(texts) <= MAX_ITEMS or not all(isinstance(t, str) for t in texts):
        raise BadRequest(f"{name} must be a string, or a list of 1 to {MAX_ITEMS} strings.", name)
    return texts


def _num_choices(body: dict[str, Any], num_prompts: int) -> int:
    n = body.get("n", 1)
    if type(n) is not int or not 1 <= n <= MAX_CHOICES:
        raise BadRequest(f"n must be an integer between 1 and {MAX_CHOICES}, not {_shown(n)}.", "n")
    if n * num_prompts > MAX_ITEMS:
        raise BadRequest(f"{num_prompts} prompts with n={n} are more than the {MAX_ITEMS} texts of a request.", "n")
    return n


def _refuse_what_is_dropped(body: dict[str, Any], neutral: dict[str, tuple[Any, ...]]) -> None:
    if not isinstance(body.get("model"), (str, type(None))):
        raise BadRequest("model must be a string.", "model")
    for name in neutral.keys() & body.keys():
        if body[name] not in neutral[name]:
            raise BadRequest(f"{name} is not supported by FastChat's API server. {_advice(name)}", name)


def _advice(name: str) -> str:
    if name in NOWHERE:
        return "Leave it out."
    if name in RENAMED:
        return f"Leave it out, or send {RENAMED[name]} to the worker's own address, whose /v1 knows that."
    return f"Leave it out, {OTHERWISE}."


def _shown(value: object) -> str:
    return repr(value)[:100]


def _no_json(error: Exception) -> BadRequest:
    return BadRequest(f"The request body is not JSON: {' '.join(str(error).split())[:200]}.")
