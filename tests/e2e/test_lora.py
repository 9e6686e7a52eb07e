"""LoRA adapters on low-bit weights: each is a model by its name, for every client, and comes and goes at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.make_model import SHAPES, make_adapter, make_model
from tests.processes import eventually, fastchat_api, fastchat_controller, listed_models, worker
from tests.support import generate, openai_client

RANK = 4
TARGETS = ("q_proj", "v_proj", "down_proj")
PROMPT: Any = {"prompt": "def", "max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}}


def merge(model: Path, adapter: Path, folder: Path) -> Path:
    """The model with the adapter added to its weights: what serving the two apart must come near to."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    weights, tensors = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, weight in weights.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in tensors:
            update = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"] * 2  # alpha / r
            weights[name] = (weight.float() + update).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logprobs(client: openai.OpenAI, model: str) -> torch.Tensor:
    """Of the tokens of a fixed text, [number of tokens]: what the model thinks of them, whatever it would write."""
    answer = client.completions.create(
        model=model, prompt="def spam(eggs):\n    return eggs + 1\n" * 4, max_tokens=1, logprobs=0, echo=True
    )
    assert answer.choices[0].logprobs is not None
    return torch.tensor((answer.choices[0].logprobs.token_logprobs or [])[1:-1])


def test_adapters_on_low_bit_weights_are_models_of_their_own(tmp_path: Path) -> None:
    model = make_model("tiny", tmp_path / "tiny")
    assert SHAPES["tiny"]["hidden_size"] == 128
    first, second = (make_adapter(model, tmp_path / f"adapter-{seed}", RANK, TARGETS, seed) for seed in (1, 2))
    merged = merge(model, first, tmp_path / "merged")
    flags = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--lora-modules", f"first={first}")
    arguments: tuple[str, ...] = ("--model-path", str(model), "--low-bit", "sym_int8", *flags)
    with fastchat_controller(tmp_path / "controller") as controller:
        address = ("--controller-address", controller.url)
        with (
            worker(tmp_path / "worker", *arguments, *address, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as running,
            fastchat_api(tmp_path / "api", controller.url) as api,
            openai_client(running.url) as own,
            openai_client(api.url) as beside,
        ):
            assert sorted(listed_models(controller.url)) == ["first", "tiny"]
            assert [item.id for item in own.models.list().data] == ["tiny", "first"]
            with_adapter, without = logprobs(own, "first"), logprobs(own, "tiny")

            # The same text by every client, and not the text of the model alone.
            text = own.completions.create(model="first", **PROMPT).choices[0].text
            assert text != own.completions.create(model="tiny", **PROMPT).choices[0].text
            frame = generate(
                running.url, model="first", prompt="def", echo=False, max_new_tokens=24, temperature=0, ignore_eos=True
            )
            assert frame["text"] == text
            by_fastchat = beside.completions.create(model="first", prompt="def", max_tokens=4, temperature=0)
            assert text.startswith(by_fastchat.choices[0].text)

            # Loaded and unloaded at run time; the controller is told.
            load = {"lora_name": "second", "lora_path": str(second)}
            httpx.post(f"{running.url}/v1/load_lora_adapter", json=load, trust_env=False).raise_for_status()
            eventually(lambda: sorted(listed_models(controller.url)) == ["first", "second", "tiny"], "told")
            assert own.completions.create(model="second", **PROMPT).choices[0].text != text
            httpx.post(
                f"{running.url}/v1/unload_lora_adapter", json={"lora_name": "second"}, trust_env=False
            ).raise_for_status()
            eventually(lambda: sorted(listed_models(controller.url)) == ["first", "tiny"], "told")
            assert generate(running.url, model="second", prompt="def")["error_code"] == 40301
            with pytest.raises(openai.NotFoundError):
                own.completions.create(model="second", **PROMPT)
    arguments = ("--model-path", str(merged), "--no-register", "--low-bit", "fp32")
    with worker(tmp_path / "merged-worker", *arguments) as running, openai_client(running.url) as client:
        wanted = logprobs(client, "merged")
    near, far = ((each - wanted).abs().mean() for each in (with_adapter, without))
    assert near < 0.1 * far, (near, far)


def test_an_adapters_layer_still_asks_the_wrapped_one_for_a_weight() -> None:
    """Once it does not, a low-bit layer need not keep an empty one."""
    from vllm.lora.layers.utils import _get_lora_device

    layer = torch.nn.Module()
    with pytest.raises(ValueError, match="Unsupported base layer"):
        _get_lora_device(layer)
    layer.weight = torch.empty(0)
    assert _get_lora_device(layer) == torch.device("cpu")
