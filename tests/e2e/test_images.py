"""Pictures: by the worker's /v1, and by FastChat's worker protocol as its own multimodal workers take them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from benchmarks.make_model import train_tokenizer, training_text
from benchmarks.models.pictures import TOWER
from benchmarks.models.tiny import load, make, rename
from benchmarks.models.zoo import ARCHITECTURES
from tests.processes import fastchat_controller, listed_models, worker
from tests.support import generate, openai_client

MARK = "$$<image>$$"  # FastChat's
SIZE, PATCH = 28, 14


def chat_template(placeholder: str) -> str:
    """Of a model that has `placeholder` in each picture's place."""
    return (
        "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
        f"{{%- else -%}}{{{{- '{placeholder}' -}}}}{{%- endif -%}}"
        "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )


def make_llava(folder: Path) -> Path:
    """LLaVA with random weights, as Transformers saves it."""
    tokenizer = train_tokenizer(2048, training_text(500_000))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = chat_template("<image>")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2112,
        max_position_embeddings=2048,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    rename(folder / "model.safetensors", TOWER)
    edge = {"height": SIZE, "width": SIZE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=edge),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
    return folder


def picture(color: str) -> str:
    """A picture of one color as PNG, in base64."""
    written = io.BytesIO()
    open_picture(color).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def open_picture(color: str) -> Image.Image:
    return Image.new("RGBA" if color.startswith("#") else "RGB", (2 * SIZE, SIZE), color)


def test_a_picture_changes_the_answer_by_both_protocols(tmp_path: Path) -> None:
    model = make_llava(tmp_path / "llava")
    with fastchat_controller(tmp_path / "controller") as controller:
        arguments = ("--model-path", str(model), "--low-bit", "sym_int8", "--controller-address", controller.url)
        with worker(tmp_path / "worker", *arguments) as running, openai_client(running.url) as client:
            assert listed_models(controller.url) == ["llava"]
            listed = httpx.post(f"{controller.url}/list_multimodal_models", trust_env=False).json()
            assert listed == {"models": ["llava"]}

            def by_openai(*colors: str) -> str:
                parts: list[Any] = [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture(color)}"}}
                    for color in colors
                ]
                answer = client.chat.completions.create(
                    model="llava",
                    messages=[{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}],
                    temperature=0,
                    max_tokens=16,
                    extra_body={"ignore_eos": True},
                )
                return str(answer.choices[0].message.content)

            def by_fastchat(*colors: str, **changed: Any) -> dict[str, Any]:
                text = f"<|im_start|>user\n{MARK * len(colors)}What is it?<|im_end|>\n<|im_start|>assistant\n"
                images = [picture(color) for color in colors]
                asked = {"prompt": text, "images": images, "echo": False, "temperature": 0, "max_new_tokens": 16}
                return generate(running.url, **{**asked, "ignore_eos": True, **changed})

            for colors in ((), ("red",), ("red", "blue"), ("#ff000000",)):  # the last one is transparent
                assert by_fastchat(*colors)["text"] == by_openai(*colors)
            assert len({by_openai(), by_openai("red"), by_openai("white")}) == 3
            # 4 patches stand for the picture.
            assert by_fastchat("red")["usage"]["prompt_tokens"] == by_fastchat()["usage"]["prompt_tokens"] + 4
            for wrong, told in (
                ({"images": ["bm8gcGljdHVyZQ=="]}, "images[0] cannot be read as a picture"),
                ({"images": ["?"]}, "images[0] is no base64"),
                ({"images": ["http://127.0.0.1/x.png"]}, "images[0] is an address"),
                ({"images": [picture("red")] * 2}, "1 marks"),
            ):
                answer = by_fastchat("red", **wrong)
                assert (answer["error_code"], told in answer["text"]) == (40302, True), answer
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(
                    model="llava",
                    messages=[
                        {
                            "role": "user",
                            "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,bm8="}}],
                        }
                    ],
                )


@pytest.mark.parametrize("name", ["qwen2.5-vl-picture", "gemma3-picture"])
def test_what_is_said_of_pictures_is_what_transformers_says(name: str, tmp_path: Path) -> None:
    """Of Qwen's, whose tower has windows and whose positions have sections; of Gemma's, whose parts see each other."""
    pictures = ARCHITECTURES[name].picture
    assert pictures is not None
    make(ARCHITECTURES[name], tmp_path / "model")
    model = load(ARCHITECTURES[name], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(chat_template(pictures.mark))
    processor = AutoProcessor.from_pretrained(tmp_path / "model")

    def prompt(mark: str, colors: tuple[str, ...]) -> str:
        return f"<|im_start|>user\nw40 w41 w42{mark * len(colors)}<|im_end|>\n<|im_start|>assistant\n"

    def by_transformers(colors: tuple[str, ...]) -> list[str]:
        shown = {"images": [open_picture(color) for color in colors]} if colors else {}
        inputs = processor(text=prompt(pictures.mark, colors), return_tensors="pt", **shown)
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=32, eos_token_id=None)
        new = answer[0, inputs["input_ids"].shape[1] :]
        return str(processor.decode(new, skip_special_tokens=True)).split()

    arguments = ("--model-path", str(tmp_path / "model"), "--model-names", "vl", "--low-bit", "fp32", "--no-register")
    with worker(tmp_path / "worker", *arguments) as running, openai_client(running.url) as client:
        answers = []
        for colors in ((), ("red",), ("red", "blue")):
            parts: list[Any] = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture(color)}"}}
                for color in colors
            ]
            answer = client.chat.completions.create(
                model="vl",
                messages=[{"role": "user", "content": [{"type": "text", "text": "w40 w41 w42"}, *parts]}],
                temperature=0,
                max_tokens=32,
                extra_body={"ignore_eos": True},
            )
            frame = generate(
                running.url,
                prompt=prompt(MARK, colors),
                images=[picture(color) for color in colors],
                echo=False,
                temperature=0,
                max_new_tokens=32,
                ignore_eos=True,
            )
            answers.append(by_transformers(colors))
            assert (answer.choices[0].message.content or "").split() == frame["text"].split() == answers[-1]
        assert len(set(map(tuple, answers))) == 3
