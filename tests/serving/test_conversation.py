"""Chats reach the model in its own format, whatever FastChat's API server makes of them.

The oracle on one side is Hugging Face's chat template, on the other FastChat's own code. The templates below are
written from each family's public prompt format, as far as it is about texts; the tokenizer under them is a byte-level
one with the family's special tokens.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from fastchat.conversation import Conversation, SeparatorStyle, conv_templates
from fastchat.serve import openai_api_server
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from ipex_vllm import fastchat_requests
from ipex_vllm.engines import template_bound
from ipex_vllm.engines.generation import Generation, InvalidParameter
from ipex_vllm.engines.stop_tokens import stop_at_special_tokens
from ipex_vllm.engines.tokenization import PromptEncoder
from ipex_vllm.errors import EngineError, OptionError
from ipex_vllm.serving import template_trial
from ipex_vllm.serving.conversation import (
    PROMPT_TEMPLATES,
    ChatFormat,
    as_json,
    choose_chat_format,
    match_registry,
    own_format,
    render_conversation,
)

# Sets `system` ("" without one) and `turns`, for templates that write the system message inside a user turn.
TAKE_SYSTEM_OUT = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}
"""


@dataclasses.dataclass(frozen=True)
class Family:
    template: str
    bos: str | None
    eos: str
    adds_bos: bool = False  # the tokenizer writes BOS by itself
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()  # tokens that are text
    takes_parts: bool = False
    end_of_turn: str | None = None  # where it is not EOS


FAMILIES = {
    "llama-2": Family(
        TAKE_SYSTEM_OUT
        + """\
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{ bos_token + '[INST] ' }}
        {%- if loop.first and system -%}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{%- endif -%}
        {{ message.content + ' [/INST]' }}
    {%- else -%}
        {{ ' ' + message.content + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}""",
        bos="<s>",
        eos="</s>",
        adds_bos=True,
    ),
    "llama-3": Family(
        """\
{{- bos_token -}}
{%- for message in messages -%}
    {{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}""",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        adds_bos=True,
        special=("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "qwen-2.5": Family(
        """\
{%- if messages[0].role != 'system' -%}
    {{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}""",
        bos=None,
        eos="<|im_end|>",
        special=("<|im_start|>",),
    ),
    # Version 0.3: the system message stands in the last user turn, so it moves as the dialogue goes on.
    "mistral": Family(
        TAKE_SYSTEM_OUT
        + """\
{{- bos_token -}}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{ '[INST] ' }}
        {%- if loop.last and system -%}{{ system + '\n\n' }}{%- endif -%}
        {{ message.content + '[/INST]' }}
    {%- else -%}
        {{ ' ' + message.content + eos_token }}
    {%- endif -%}
{%- endfor -%}""",
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        special=("[INST]", "[/INST]"),
    ),
    # Version 0.1: in the first user turn.
    "mistral-0.1": Family(
        TAKE_SYSTEM_OUT
        + """\
{{- bos_token -}}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{ ' [INST] ' }}
        {%- if loop.first and system -%}{{ system + '\n\n' }}{%- endif -%}
        {{ message.content + ' [/INST]' }}
    {%- else -%}
        {{ ' ' + message.content + eos_token }}
    {%- endif -%}
{%- endfor -%}""",
        bos="<s>",
        eos="</s>",
        adds_bos=True,
    ),
    "gemma": Family(
        """\
{%- if messages[0].role == 'system' -%}{{ raise_exception('this model knows no system role') }}{%- endif -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    {{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}""",
        bos="<bos>",
        eos="<eos>",
        adds_bos=True,
        special=("<start_of_turn>", "<end_of_turn>"),
        end_of_turn="<end_of_turn>",
    ),
    "phi-3": Family(
        """\
{%- for message in messages -%}
    {{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}
{%- endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}""",
        bos="<s>",
        eos="<|endoftext|>",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        end_of_turn="<|end|>",
    ),
    # Its tokenizer writes BOS, its template does not.
    "zephyr": Family(
        """\
{%- for message in messages -%}
    {{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}""",
        bos="<s>",
        eos="</s>",
        adds_bos=True,
    ),
    "chatml": Family(
        """\
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}""",
        bos=None,
        eos="<|im_end|>",
        special=("<|im_start|>",),
    ),
    # Thoughts stay in what follows the last question alone, and open that if there are none.
    "qwen-3": Family(
        """\
{%- if messages[0].role == 'system' -%}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- set ns = namespace(last=messages|length - 1) -%}
{%- for message in messages[::-1] -%}
    {%- set index = (messages|length - 1) - loop.index0 -%}
    {%- if message.role == 'user' and not ns.found -%}
        {%- set ns.found = true -%}{%- set ns.last = index -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set content = message.content -%}{%- set thought = '' -%}
        {%- if '</think>' in content -%}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {%- if loop.index0 > ns.last and (loop.last or thought) -%}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
            {{- content.lstrip('\\n') -}}
        {%- else -%}
            {{- '<|im_start|>assistant\\n' + content -}}
        {%- endif -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}""",
        bos=None,
        eos="<|im_end|>",
        special=("<|im_start|>", "<|endoftext|>"),
        added=("<think>", "</think>"),
    ),
    "deepseek-r1": Family(
        """\
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{%- set ns.system = message.content -%}{%- endif -%}
{%- endfor -%}
{{- bos_token + ns.system -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{{- '<|User|>' + message.content -}}{%- endif -%}
    {%- if message.role == 'assistant' -%}
        {%- set content = message.content -%}
        {%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
        {{- '<|Assistant|>' + content + eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}""",
        bos="<|begin|>",
        eos="<|end|>",
        adds_bos=True,
        special=("<|User|>", "<|Assistant|>"),
        added=("<think>", "</think>"),
    ),
    # It trims, wants users and replies in turn, and writes the system message into the first user's turn.
    "gemma-3": Family(
        TAKE_SYSTEM_OUT
        + """\
{{- bos_token -}}
{%- for message in turns -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' -}}
    {%- if loop.first and system -%}{{- system + '\\n\\n' -}}{%- endif -%}
    {{- message.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}""",
        bos="<bos>",
        eos="<eos>",
        adds_bos=True,
        special=("<start_of_turn>", "<end_of_turn>"),
        end_of_turn="<end_of_turn>",
    ),
    # Harmony: a reply has parts in channels, which the model opens itself, and <|end|> closes each of them.
    "gpt-oss": Family(
        TAKE_SYSTEM_OUT
        + """\
{{- '<|start|>system<|message|>You are ChatGPT.\\n\\nReasoning: medium<|end|>' -}}
{%- if system -%}{{- '<|start|>developer<|message|># Instructions\\n\\n' + system + '\\n\\n<|end|>' -}}{%- endif -%}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' -}}
    {%- elif '<|channel|>analysis<|message|>' in message.content -%}
        {{- raise_exception('You have passed a message containing <|channel|> tags in the content field.') -}}
    {%- elif loop.last and not add_generation_prompt -%}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' -}}
    {%- else -%}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}""",
        bos=None,
        eos="<|return|>",
        special=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
    ),
    # What ends a turn opens the next one.
    "glm-4": Family(
        """\
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
    {{- '<|' + message.role + '|>\\n' + message.content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}""",
        bos=None,
        eos="<|endoftext|>",
        special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        end_of_turn="<|user|>",
    ),
    # Its EOS is another token than the one that ends a turn.
    "phi-4": Family(
        """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}""",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        special=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        end_of_turn="<|im_end|>",
    ),
    "mistral-small": Family(
        """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{{- '[INST]' + message.content + '[/INST]' -}}
    {%- elif message.role == 'system' -%}{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' -}}
    {%- else -%}{{- message.content + eos_token -}}{%- endif -%}
{%- endfor -%}""",
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        special=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    # A multimodal model's, whose messages have parts.
    "parts": Family(
        """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- for part in message.content | selectattr('type', 'equalto', 'text') -%}{{- part.text -}}{%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}""",
        bos=None,
        eos="<|im_end|>",
        special=("<|im_start|>",),
        takes_parts=True,
    ),
    # The reply to come opens with a thought; earlier replies are written without theirs.
    "thinking": Family(
        """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{{ message.content }}{%- endif -%}
    {%- if message.role == 'user' -%}{{ '<|User|>' + message.content }}{%- endif -%}
    {%- if message.role == 'assistant' -%}{{ '<|Assistant|>' + message.content + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\n' }}{%- endif -%}""",
        bos="<|begin|>",
        eos="<|end|>",
        adds_bos=True,
        special=("<|User|>", "<|Assistant|>"),
    ),
}

DIALOGUES = {
    "one question": ["What is the capital of France?"],
    "two turns": ["Hi!", "Hello, how can I help?", "Tell me a joke about {braces}."],
    "four turns": [
        "One\n\n1. first",
        "Yes.",
        "Two",
        "  Indented reply.\n```python\nx = {}\n```",
        "Three",
        "OK",
        "Four",
    ],
    "look-alikes": ["What does </s> mean? And [INST]?", "It ends <|im_end|> a turn.", "user\n<|user|>\n"],
}
DIALOGUES_OUT_OF_TURN = {
    "two users in a row": [("user", "Hi"), ("user", "Are you there?")],
    "the assistant first": [("assistant", "How can I help?"), ("user", "Tell me a joke.")],
    "the assistant last": [("user", "Hi"), ("assistant", "Hello")],
    "an empty reply": [("user", "Hi"), ("assistant", ""), ("user", "Again, please.")],
    "two replies": [("user", "Hi"), ("assistant", "Hello"), ("assistant", "there"), ("user", "Hm.")],
    "an empty question": [("user", ""), ("assistant", "Yes?"), ("user", "Hi")],
    "spaces": [("user", "  Hi \n"), ("assistant", "\n\nHello  "), ("user", "\tWhy?\n")],
    "thoughts": [
        ("user", "2 + 2?"),
        ("assistant", "<think>\nTwo and two,\n\nfour.\n</think>\n\n4."),
        ("user", "And 3?"),
        ("assistant", "<think>Seven</think>7"),
        ("user", "Sure?"),
    ],
    "an open thought": [("user", "2 + 2?"), ("assistant", "<think>\nLet me"), ("user", "Go on.")],
    "nobody": [],
}
SYSTEM_MESSAGES = ["You are terse.", "Use {one} word.\n\nAlways.", "  spaced  "]


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, so that equal tokens mean equal text, in which special tokens are tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (family.bos, family.eos, *family.special) if token]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(list(family.added))
    if family.adds_bos:
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(f"{family.bos} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        additional_special_tokens=list(family.special),
        chat_template=family.template,
    )


def as_messages(contents: list[str], system: str | None = None) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], takes_parts: bool = False) -> str:
    """What Transformers makes of a dialogue."""
    if takes_parts:
        messages = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


async def encode(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    return await PromptEncoder(tokenizer, context_length=100_000).encode(prompt)


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def family(name: str) -> Family:
    return FAMILIES[name]


@pytest.fixture
def tokenizer(family: Family) -> PreTrainedTokenizerFast:
    return make_tokenizer(family)


@pytest.fixture
def chat_format(tokenizer: PreTrainedTokenizerFast) -> ChatFormat:
    return own_format(tokenizer)


@pytest.fixture
def api_server(monkeypatch: pytest.MonkeyPatch):
    """FastChat's API server as far as it makes a prompt: returns what it would send to the worker."""

    async def ask(chat_format: ChatFormat, messages: list[dict[str, str]]) -> dict:
        async def get_conv(model_name: str, worker_addr: str) -> dict:
            return json.loads(json.dumps(chat_format.conversation))  # as it comes out of /worker_get_conv_template

        monkeypatch.setattr(openai_api_server, "get_conv", get_conv)
        unset = dict.fromkeys(["top_k", "presence_penalty", "frequency_penalty", "max_tokens", "echo", "stop"])
        return await openai_api_server.get_gen_params("model", "url", messages, temperature=1.0, top_p=1.0, **unset)

    return ask


@pytest.mark.parametrize("system", [None, *SYSTEM_MESSAGES])
@pytest.mark.parametrize("dialogue", DIALOGUES.values(), ids=DIALOGUES)
async def test_a_chat_is_the_prompt_of_the_chat_template(
    name, family, tokenizer, chat_format, api_server, dialogue, system
):
    messages = as_messages(dialogue, system)
    prompt = (await api_server(chat_format, messages))["prompt"]
    if name == "gemma" and system is not None:  # it refuses system messages
        first, *rest = dialogue
        messages = as_messages([f"{system}\n\n{first}", *rest])
    assert chat_format.normalize(prompt) == render(tokenizer, messages, family.takes_parts)


@pytest.mark.parametrize("dialogue", DIALOGUES_OUT_OF_TURN.values(), ids=DIALOGUES_OUT_OF_TURN)
async def test_a_dialogue_out_of_turn_is_what_the_chat_template_makes_of_it(
    family, tokenizer, chat_format, api_server, dialogue
):
    messages = [{"role": role, "content": content} for role, content in dialogue]
    prompt = (await api_server(chat_format, messages))["prompt"]
    try:
        expected = render(tokenizer, messages, family.takes_parts)
    except Exception as error:  # of Jinja: some want users and replies in turn
        sentence = re.escape(f"The model's chat template refuses this dialogue: {error}")
        with pytest.raises(InvalidParameter, match=f"^{sentence}$"):
            chat_format.normalize(prompt)
    else:
        assert chat_format.normalize(prompt) == expected


@pytest.mark.parametrize("name", ["qwen-3", "deepseek-r1"], indirect=True)
async def test_thoughts_are_left_out_of_earlier_replies(chat_format, api_server):
    messages = [{"role": role, "content": content} for role, content in DIALOGUES_OUT_OF_TURN["thoughts"]]
    prompt = chat_format.normalize((await api_server(chat_format, messages))["prompt"])
    assert "Two and two" not in prompt
    assert "Seven" not in prompt
    assert "4." in prompt


@pytest.mark.parametrize("name", ["qwen-3", "mistral", "phi-4"], indirect=True)
async def test_several_system_messages_come_first_and_together(tokenizer, chat_format, api_server):
    """As the guard of FastChat's API server hands them on; FastChat itself keeps the last one."""
    system = [{"role": "system", "content": content} for content in ("Be terse.", "Be kind.")]
    question = {"role": "user", "content": "Hi"}
    body = fastchat_requests.chat({"model": "m", "messages": [system[0], question, system[1]]})
    prompt = (await api_server(chat_format, body["messages"]))["prompt"]
    together = {"role": "system", "content": "Be terse.\n\nBe kind."}
    assert chat_format.normalize(prompt) == render(tokenizer, [together, question])


def test_a_client_may_leave_the_system_block_out(family, tokenizer, chat_format):
    roles = chat_format.conversation["roles"]
    prompt = f"{roles[0]}Hi{chat_format.conversation['sep']}{roles[1]}"
    assert chat_format.normalize(prompt) == render(tokenizer, as_messages(["Hi"]), family.takes_parts)


@pytest.mark.parametrize("name", ["qwen-3"], indirect=True)
def test_control_characters_in_a_text_are_text(tokenizer, chat_format):
    messages = as_messages(["a\x1eb\x1d\x1f\x1e", "\x1duser", "\x1a"], "\x1d system \x1f")
    prompt = render_conversation(chat_format.conversation, messages)
    assert chat_format.normalize(prompt) == render(tokenizer, messages)


@pytest.mark.parametrize("name", ["gemma"], indirect=True)
async def test_a_system_message_that_the_model_has_no_place_for_opens_the_first_user_turn(chat_format, api_server):
    prompt = (await api_server(chat_format, as_messages(["Hi", "Hello", "Why?"], "Be terse.")))["prompt"]
    assert chat_format.normalize(prompt) == (
        "<bos><start_of_turn>user\nBe terse.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize("name", ["qwen-2.5"], indirect=True)
async def test_the_models_default_system_message_is_kept_until_a_client_sends_one(chat_format, api_server):
    prompt = chat_format.normalize((await api_server(chat_format, as_messages(["Hi"])))["prompt"])
    assert "You are Qwen" in prompt
    prompt = chat_format.normalize((await api_server(chat_format, as_messages(["Hi"], "You are a pirate.")))["prompt"])
    assert "You are Qwen" not in prompt
    assert prompt.count("<|im_start|>system") == 1
    # An empty one is a wish of its own: the model's template writes an empty block then, and so do we.
    prompt = (await api_server(chat_format, as_messages(["Hi"], "")))["prompt"]
    assert chat_format.normalize(prompt).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi")


@pytest.mark.parametrize("name", ["chatml", "llama-2", "llama-3", "phi-3", "zephyr", "gemma", "mistral"], indirect=True)
async def test_an_empty_system_message_leaves_no_block_that_the_model_has_never_seen(
    tokenizer, chat_format, api_server
):
    raw = (await api_server(chat_format, as_messages(["Hi"], "")))["prompt"]
    without = render(tokenizer, as_messages(["Hi"]))
    assert chat_format.normalize(raw) == without


@pytest.mark.parametrize("prompt", ["Once upon a time", "", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"])
def test_a_prompt_that_is_no_dialogue_of_fastchats_is_left_as_it_is(chat_format, prompt):
    assert chat_format.normalize(prompt) == prompt


@pytest.mark.parametrize("system", [None, "You are terse."])
async def test_the_model_sees_one_bos(family, tokenizer, chat_format, api_server, system):
    prompt = (await api_server(chat_format, as_messages(["Hi"], system)))["prompt"]
    token_ids = await encode(tokenizer, chat_format.normalize(prompt))
    if family.adds_bos:
        assert token_ids[0] == tokenizer.bos_token_id
        assert token_ids.count(tokenizer.bos_token_id) == 1
    else:
        assert tokenizer.bos_token_id not in token_ids


async def test_braces_around_a_system_message(api_server):
    """FastChat fills the system template with str.format."""
    template = """\
{%- for message in messages -%}
    {%- set text = message.role + ': ' + message.content -%}
    {{ ('{' + text + '}' if message.role == 'system' else text) + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"""
    chat_format = own_format(make_tokenizer(Family(template, bos="<s>", eos="</s>")))
    prompt = (await api_server(chat_format, as_messages(["Hi"], "Be {terse}.")))["prompt"]
    assert chat_format.normalize(prompt) == "{system: Be {terse}.}\nuser: Hi\nassistant: "


def test_the_conversation_stops_at_tokens_not_at_text(family, tokenizer, chat_format):
    ends = {family.eos, family.end_of_turn} - {None}
    assert set(chat_format.conversation["stop_token_ids"]) == set(tokenizer.convert_tokens_to_ids(sorted(ends)))
    assert chat_format.conversation["stop_str"] is None


@pytest.mark.parametrize("name", ["llama-2"], indirect=True)
async def test_a_literal_end_of_sequence_in_the_text_is_no_stop_string(tokenizer, chat_format, api_server):
    params = await api_server(chat_format, as_messages(["Explain </s>."]))
    assert params["stop"] == []
    assert params["stop_token_ids"] == [tokenizer.eos_token_id]
    assert chat_format.normalize(params["prompt"]) == "<s>[INST] Explain </s>. [/INST]"


def test_the_json_form_is_all_of_a_fastchat_conversation(chat_format):
    sent = json.loads(json.dumps(chat_format.conversation))
    assert set(sent) == {field.name for field in dataclasses.fields(Conversation)}
    conversation = Conversation(**{**sent, "sep_style": SeparatorStyle(sent["sep_style"])})
    assert as_json(conversation.copy()) == sent


@pytest.mark.parametrize("template", sorted(PROMPT_TEMPLATES))
def test_every_template_of_the_registry_survives_the_json_form(template):
    conversation = conv_templates[template]
    sent = json.loads(json.dumps(as_json(conversation)))
    received = Conversation(**{**sent, "sep_style": SeparatorStyle(sent["sep_style"])})
    received.append_message(received.roles[0], "Hi")
    received.append_message(received.roles[1], None)
    original = conversation.copy()
    original.append_message(original.roles[0], "Hi")
    original.append_message(original.roles[1], None)
    assert received.get_prompt() == original.get_prompt()
    assert (received.stop_str, received.stop_token_ids) == (original.stop_str, original.stop_token_ids)


PLAIN_TOKENIZER = SimpleNamespace(chat_template=None)


@pytest.mark.parametrize(
    ("model_path", "template"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2"),
        ("/models/mistral-7b-openorca/", "mistral-7b-openorca"),  # the longest name wins over "mistral"
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama"),
        ("/home/zephyr/models/unknown", None),  # a folder on the way is not the model's name
        ("straw-7b", None),  # "raw" is a template, but no word of this name
    ],
)
def test_the_registry_knows_a_model_by_its_name(model_path, template, caplog):
    assert match_registry(model_path) == template
    chat_format = choose_chat_format(PLAIN_TOKENIZER, model_path, None)
    assert chat_format.conversation == as_json(conv_templates[template or "one_shot"])
    assert ("No conversation template is known" in caplog.text) == (template is None)


def test_an_unknown_model_is_warned_of(caplog):
    chat_format = choose_chat_format(PLAIN_TOKENIZER, "unknown-7b", None)
    assert chat_format.conversation["name"] == "one_shot"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'one_shot'" in caplog.text
    assert "--conv-template" in caplog.text


@pytest.mark.parametrize("name", ["chatml"], indirect=True)
def test_the_models_own_template_wins_over_the_registry(tokenizer, chat_format):
    assert choose_chat_format(tokenizer, "zephyr-7b", None) == chat_format


@pytest.mark.parametrize("name", ["chatml"], indirect=True)
def test_the_template_that_was_asked_for_wins_over_all(tokenizer):
    assert choose_chat_format(tokenizer, "zephyr-7b", "vicuna_v1.1").conversation == as_json(
        conv_templates["vicuna_v1.1"]
    )


@pytest.mark.parametrize("wrong", ["vicuna", "chatgpt"], ids=["unknown", "a chat service"])
def test_a_wrong_template_name_is_one_line_with_the_right_ones(wrong):
    with pytest.raises(OptionError) as error:
        choose_chat_format(PLAIN_TOKENIZER, "zephyr-7b", wrong)
    assert f"--conv-template {wrong}:" in str(error.value)
    assert "vicuna_v1.1" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}[Round {{ loop.index }}] {{ message.content }}\n{% endfor %}",
        "{% for message in messages %}{{ message.content | upper }}: {{ message.content }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for message in messages %}{% generation %}{{ message.content }}{% endgeneration %}{% endfor %}",
    ],
    ids=["numbers turns", "changes the text", "keeps the last message only", "has Transformers' own block"],
)
def test_a_template_may_do_with_a_dialogue_what_it_likes(template):
    tokenizer = make_tokenizer(Family(template, bos="<s>", eos="</s>"))
    chat_format = own_format(tokenizer)
    for dialogue in DIALOGUES.values():
        prompt = render_conversation(chat_format.conversation, as_messages(dialogue))
        assert chat_format.normalize(prompt) == render(tokenizer, as_messages(dialogue))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no chats') }}", "no chats"),
        ("{% for message in messages %}{{ message.content }}", "Unexpected end of template"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("Hello!", "it leaves out what the user says"),
    ],
)
def test_a_broken_template_is_told_with_what_is_used_instead(template, reason, caplog):
    tokenizer = make_tokenizer(Family(template, bos="<s>", eos="</s>"))
    chat_format = choose_chat_format(tokenizer, "zephyr-7b", None)
    assert "The model's chat template cannot be used: " in caplog.text
    assert reason in caplog.text
    assert chat_format.conversation["name"] == "zephyr"
    assert chat_format.source == "FastChat's template 'zephyr', by the model's name"


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "template_name"),
    [
        (ENDLESS + "{{ messages[0].content }}", None),
        ("{% if messages|length > 9 %}" + ENDLESS + "{% endif %}{{ messages[0].content }}", "vicuna_v1.1"),
        ("{% set ns = namespace(x='very') %}{% for i in range(30) %}{% set ns.x = ns.x * 9 %}{% endfor %}", None),
    ],
    ids=["loops", "loops in a long dialogue", "takes all memory"],
)
def test_a_template_that_does_not_end_is_refused(template, template_name, monkeypatch):
    monkeypatch.setattr(template_trial, "CPU_LIMIT_S", 1)
    tokenizer = make_tokenizer(Family(template, bos="<s>", eos="</s>"))
    with pytest.raises(EngineError) as error:
        choose_chat_format(tokenizer, "zephyr-7b", template_name)
    assert str(error.value).startswith(
        "the model's chat template did not end within 1 s of processor time and 1024 MiB"
    )
    assert "\n" not in str(error.value)


# How long a template may take once it is served


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    environment = chat_template_utils.ImmutableSandboxedEnvironment
    monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", environment)  # which puts it back
    chat_template_utils._compile_jinja_template.cache_clear()
    template_bound.bound_templates()
    yield
    chat_template_utils._compile_jinja_template.cache_clear()


@pytest.mark.parametrize("dialogue", DIALOGUES.values(), ids=DIALOGUES)
def test_a_bound_changes_no_prompt(family, tokenizer, dialogue, request):
    messages = as_messages(dialogue)
    unbounded = render(tokenizer, messages, family.takes_parts)
    request.getfixturevalue("bounded")
    assert render(tokenizer, messages, family.takes_parts) == unbounded


@pytest.mark.parametrize(
    "loop",
    [
        ENDLESS,
        "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
        "{% for i in [99] recursive %}{% if i %}{{ loop([i - 1, i - 1]) }}{% endif %}{% endfor %}",
    ],
    ids=["nested", "filtered", "macro", "recursive"],
)
def test_a_template_that_loops_on_one_dialogue_refuses_that(bounded, monkeypatch, loop):
    monkeypatch.setattr(template_bound, "CPU_LIMIT_S", 0.2)
    template = "{% if messages[0].content == 'Loop!' %}" + loop + "{% endif %}{{ messages[0].content }}"
    chat_format = own_format(make_tokenizer(Family(template, bos="<s>", eos="</s>")))
    for content in ("Hi", "Loop!", "Hi"):
        prompt = render_conversation(chat_format.conversation, as_messages([content]))
        if content == "Hi":
            assert chat_format.normalize(prompt) == "Hi"
        else:
            with pytest.raises(InvalidParameter, match=r"refuses this dialogue: it was not done after 0\.2 s"):
                chat_format.normalize(prompt)


# Where an answer ends


def test_gpt_oss_does_not_stop_where_a_part_of_an_answer_ends(tmp_path):
    tokenizer = make_tokenizer(FAMILIES["gpt-oss"])
    ids = dict(
        zip(tokens := ["<|return|>", "<|call|>", "<|end|>"], tokenizer.convert_tokens_to_ids(tokens), strict=True)
    )
    assert own_format(tokenizer).conversation["stop_token_ids"] == [ids["<|return|>"]]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<|return|>"], ids["<|call|>"]]}))
    stops = choose_chat_format(tokenizer, str(tmp_path), None).conversation["stop_token_ids"]
    assert stops == sorted([ids["<|return|>"], ids["<|call|>"]])


@pytest.mark.parametrize("name", ["chatml"], indirect=True)
@pytest.mark.parametrize(
    ("generation_config", "eos"),
    [('{"eos_token_id": 7}', [7]), ('{"eos_token_id": [7, 8]}', [7, 8]), ("{}", []), ("[", []), ("[1]", [])],
)
def test_the_generation_configuration_tells_what_ends_an_answer_too(tokenizer, tmp_path, generation_config, eos):
    (tmp_path / "generation_config.json").write_text(generation_config)
    stops = choose_chat_format(tokenizer, str(tmp_path), None).conversation["stop_token_ids"]
    assert stops == sorted([*eos, tokenizer.eos_token_id])


@pytest.mark.parametrize("is_special", [True, False])
def test_an_end_of_turn_counts_though_it_is_neither_eos_nor_special(is_special):
    family = dataclasses.replace(
        FAMILIES["chatml"],
        eos="</s>",
        special=("<|im_start|>", "<|im_end|>") if is_special else ("<|im_start|>",),
        added=() if is_special else ("<|im_end|>",),
    )
    tokenizer = make_tokenizer(family)
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert own_format(tokenizer).conversation["stop_token_ids"] == sorted(ends)


@pytest.mark.parametrize("name", ["qwen-3"], indirect=True)
def test_a_stop_string_that_is_a_special_token_is_that_token(tokenizer):
    """It is never part of a text, where stop strings are looked for. A token that is text is found there."""
    asked = Generation("p", stop=("<|endoftext|>", "</think>", "<|im_end|> ", "word"), stop_token_ids=(5,))
    stopping = stop_at_special_tokens(asked, tokenizer)
    assert stopping.stop_token_ids == (5, tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    assert stopping.stop == asked.stop
    assert stop_at_special_tokens(Generation("p"), tokenizer) == Generation("p")
