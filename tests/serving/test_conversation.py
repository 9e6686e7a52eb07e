"""Chats reach the model in its own format, whatever FastChat's API server makes of them.

The oracle on one side is Hugging Face's chat template, on the other FastChat's own code. The templates below are
written from each family's public prompt format; the tokenizer under them is a byte-level one with the family's special
tokens.
"""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
from fastchat.conversation import Conversation, SeparatorStyle, conv_templates
from fastchat.serve import openai_api_server
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ipex_vllm.engines.tokenization import PromptEncoder
from ipex_vllm.errors import OptionError
from ipex_vllm.serving.conversation import (
    PROMPT_TEMPLATES,
    ChatFormat,
    as_json,
    choose_chat_format,
    match_registry,
    translate,
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
SYSTEM_MESSAGES = ["You are terse.", "Use {one} word.\n\nAlways."]
EXACT_SYSTEM = ["llama-2", "llama-3", "qwen-2.5", "mistral-0.1", "phi-3", "zephyr", "chatml", "thinking"]


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, so that equal tokens mean equal text, in which special tokens are tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (family.bos, family.eos, *family.special) if token]
    tokenizer.add_special_tokens(special)
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


def render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


async def encode(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    return await PromptEncoder(tokenizer, context_length=100_000).encode(prompt)


def expected_tokens(tokenizer: PreTrainedTokenizerFast, family: Family, messages: list[dict[str, str]]) -> list[int]:
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if family.adds_bos and token_ids[0] != tokenizer.bos_token_id:
        token_ids = [tokenizer.bos_token_id, *token_ids]
    return token_ids


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
    chat_format = translate(tokenizer)
    assert chat_format is not None
    return chat_format


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


@pytest.mark.parametrize("dialogue", DIALOGUES.values(), ids=DIALOGUES)
async def test_a_chat_is_the_tokens_of_the_chat_template(family, tokenizer, chat_format, api_server, dialogue):
    # Some templates trim what is said, FastChat does not: that difference is left out here.
    messages = as_messages([content.strip() for content in dialogue])
    prompt = (await api_server(chat_format, messages))["prompt"]
    assert await encode(tokenizer, chat_format.normalize(prompt)) == expected_tokens(tokenizer, family, messages)


@pytest.mark.parametrize("system", SYSTEM_MESSAGES)
@pytest.mark.parametrize("dialogue", DIALOGUES.values(), ids=DIALOGUES)
@pytest.mark.parametrize("name", EXACT_SYSTEM, indirect=True)
async def test_a_system_message_is_the_tokens_of_the_chat_template(
    family, tokenizer, chat_format, api_server, dialogue, system
):
    messages = as_messages([content.strip() for content in dialogue], system)
    prompt = (await api_server(chat_format, messages))["prompt"]
    assert await encode(tokenizer, chat_format.normalize(prompt)) == expected_tokens(tokenizer, family, messages)


@pytest.mark.parametrize("name", ["mistral"], indirect=True)
async def test_a_system_message_that_moves_with_the_last_turn_stays_in_the_first(tokenizer, api_server, caplog):
    chat_format = translate(tokenizer)
    assert "system message are rendered a little differently" in caplog.text

    one_turn = as_messages(["Hi"], "Be terse.")
    prompt = chat_format.normalize((await api_server(chat_format, one_turn))["prompt"])
    assert prompt == render(tokenizer, one_turn)

    two_turns = as_messages(["Hi", "Hello", "Why?"], "Be terse.")
    prompt = chat_format.normalize((await api_server(chat_format, two_turns))["prompt"])
    assert prompt == "<s>[INST] Be terse.\n\nHi[/INST] Hello</s>[INST] Why?[/INST]"
    assert render(tokenizer, two_turns) == "<s>[INST] Hi[/INST] Hello</s>[INST] Be terse.\n\nWhy?[/INST]"


@pytest.mark.parametrize("name", ["gemma"], indirect=True)
async def test_a_system_message_that_the_model_has_no_place_for_opens_the_first_user_turn(chat_format, api_server):
    prompt = (await api_server(chat_format, as_messages(["Hi", "Hello", "Why?"], "Be terse.")))["prompt"]
    assert chat_format.normalize(prompt) == (
        "<bos><start_of_turn>user\nBe terse.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize("name", ["qwen-2.5"], indirect=True)
async def test_the_models_default_system_message_is_kept_until_a_client_sends_one(chat_format, api_server):
    assert "You are Qwen" in (await api_server(chat_format, as_messages(["Hi"])))["prompt"]
    prompt = (await api_server(chat_format, as_messages(["Hi"], "You are a pirate.")))["prompt"]
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
    assert raw != without
    assert chat_format.normalize(raw) == without


@pytest.mark.parametrize(
    ("name", "system"),
    [(name, None) for name in FAMILIES] + [(name, "You are terse.") for name in FAMILIES if name != "gemma"],
    indirect=["name"],
)
def test_a_prompt_in_the_models_own_format_is_left_as_it_is(tokenizer, chat_format, system):
    for dialogue in DIALOGUES.values():
        prompt = render(tokenizer, as_messages(dialogue, system))
        assert chat_format.normalize(prompt) == prompt
    assert chat_format.normalize("Once upon a time") == "Once upon a time"


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
    chat_format = translate(make_tokenizer(Family(template, bos="<s>", eos="</s>")))
    prompt = (await api_server(chat_format, as_messages(["Hi"], "Be {terse}.")))["prompt"]
    assert prompt == "{system: Be {terse}.}\nuser: Hi\nassistant: "


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
        "{% for message in messages %}{{ message.role }}: {{ message.content | upper }}\n{% endfor %}",
        "{{ raise_exception('no chats') }}",
        "{{ messages[-1].content }}",
        "{% for message in messages %}{{ message.content.split(' ')[0] }}\n{% endfor %}",
    ],
    ids=["numbers turns", "changes the text", "refuses", "keeps the last message only", "shortens the text"],
)
def test_a_template_that_fastchat_cannot_say_is_not_half_said(template, caplog):
    tokenizer = make_tokenizer(Family(template, bos="<s>", eos="</s>"))
    assert translate(tokenizer) is None
    chat_format = choose_chat_format(tokenizer, "zephyr-7b", None)
    assert chat_format.conversation["name"] == "zephyr"
    assert "fits no FastChat conversation style" in caplog.text
