"""What vLLM and Transformers answer for the same model and tokens, and how far apart that is."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.models.tiny import token_ids
from benchmarks.models.zoo import Pictures
from ipex_vllm.engines.vllm_devices import ONE_PROCESS

NUM_PROMPT = 48
NUM_GREEDY = 16


@dataclass(frozen=True)
class Answer:
    """Token ids [prompt + greedy], the log probability of each but the first, and what else Transformers gets."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    beside: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """Of 63 log probabilities: of a prompt's tokens, which are computed at once, and of greedy ones, one by one.

    Attributes:
        largest, mean: absolute, in nats.
        is_greedy: whether each of vLLM's greedy tokens is Transformers' likeliest, or so near it that the difference
            decides.
    """

    largest: float
    mean: float
    is_greedy: bool


def picture() -> Any:
    """A picture of noise, 84 x 56 pixels."""
    from PIL import Image

    pixels = torch.randint(256, (56, 84, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return Image.fromarray(pixels.numpy())


def prompt_with_picture(folder: Path, pictures: Pictures) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """vLLM's prompt of words around a picture, and what Transformers' processor makes of it: `NUM_PROMPT` tokens."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)

    def read(text: str) -> Any:
        return processor(text=text, images=[picture()], return_tensors="pt")

    num_words = NUM_PROMPT - read(pictures.placeholder)["input_ids"].shape[1]
    words = [f"w{300 + index}" for index in range(num_words)]  # the beginning of none is a special token
    text = " ".join([*words[:8], pictures.placeholder, *words[8:]])
    return {"prompt": text, "multi_modal_data": {"image": picture()}}, dict(read(text))


def beside_greedy(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What Transformers gets beside the token ids, where the greedy ones, of text, follow the prompt."""
    beside = {name: tensor for name, tensor in inputs.items() if name not in ("input_ids", "attention_mask")}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in beside:
            beside[name] = torch.nn.functional.pad(beside[name], (0, NUM_GREEDY))
    return beside


def of_vllm(
    folder: Path,
    format_name: str | None,
    quantized: list[torch.Tensor],
    pictures: Pictures | None = None,
    **arguments: Any,
) -> Answer:
    """Serve a model directory as the worker does, in this process, with more of vLLM's engine arguments.

    With `pictures` one is in the prompt.

    The weights of what is quantized are added to `quantized`, as float32 [out_features, in_features].
    """
    from vllm import LLM, SamplingParams

    from ipex_vllm.low_bit import vllm_arguments
    from ipex_vllm.low_bit.kernels import experts
    from ipex_vllm.low_bit.linear import make_linear
    from ipex_vllm.low_bit.quantize import QuantizedWeight, dequantize
    from ipex_vllm.low_bit.vllm import linear

    def noting(weight: Any, dtype: torch.dtype) -> Any:
        quantized.append(dequantize(weight))
        return make_linear(weight, dtype)

    def noting_expert(weight: QuantizedWeight) -> torch.Tensor:
        quantized.append(dequantize(weight))
        return pack(weight)

    pack = experts.pack
    sampling = SamplingParams(
        temperature=0.0, max_tokens=NUM_GREEDY, logprobs=0, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    with patch.object(linear, "make_linear", noting), patch.object(experts, "pack", noting_expert):
        llm = LLM(
            model=str(folder),
            skip_tokenizer_init=not (folder / "tokenizer.json").exists(),
            language_model_only=pictures is None,
            max_model_len=128,
            max_num_seqs=4,
            max_num_batched_tokens=128,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 26,
            gpu_memory_utilization=0.05,
            distributed_executor_backend=ONE_PROCESS,
            **vllm_arguments(format_name, str(folder), "cpu"),
            **arguments,
        )
        if pictures is None:
            prompt = token_ids(llm.llm_engine.model_config.hf_config, NUM_PROMPT).tolist()
            asked, beside = {"prompt_token_ids": prompt}, {}
        else:
            asked, inputs = prompt_with_picture(folder, pictures)
            prompt, beside = inputs["input_ids"][0].tolist(), beside_greedy(inputs)
        output = llm.generate(asked, sampling, use_tqdm=False)[0]
    assert output.prompt_token_ids == prompt
    greedy = output.outputs[0]
    tokens = [*prompt, *greedy.token_ids]
    entries = [*output.prompt_logprobs[1:], *greedy.logprobs]
    logprobs = [entry[token].logprob for token, entry in zip(tokens[1:], entries, strict=True)]
    return Answer(torch.tensor(tokens), torch.tensor(logprobs), beside)


def difference(model: Any, answer: Answer) -> Difference:
    """How far an answer is from what Transformers' `model` gives the same tokens."""
    for module in model.modules():
        module.do_not_compile = True  # which vLLM asks of the classes that it also runs itself
    with torch.inference_mode():
        logits = model(input_ids=answer.token_ids.unsqueeze(0), **answer.beside).logits
    logprobs = logits[0, :-1].float().log_softmax(-1)
    expected = logprobs.gather(1, answer.token_ids[1:, None]).squeeze(1)
    errors = (expected - answer.logprobs).abs()
    gaps = (logprobs.max(-1).values - expected)[NUM_PROMPT - 1 :]
    largest = errors.max().item()
    return Difference(largest, errors.mean().item(), bool((gaps <= 2 * largest).all()))


def dequantized(model: Any, quantized: list[torch.Tensor]) -> None:
    """Give `model` the weights that vLLM has, which may have put rows of several layers together, in its own order.

    Each row is written over the one of `model` that it came from: the nearest, as rounding moves it much less than
    random rows are apart.
    """
    untie(model)
    embeddings = model.get_input_embeddings().weight
    matrices = []
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() > 1 and parameter is not embeddings:
                # GPT-2's, and some experts', are stored the other way around.
                matrices += [parameter.data, parameter.data.transpose(-1, -2)]
    for inputs in {weight.shape[1] for weight in quantized}:
        # Views, so that what is written shows in the model.
        views = [matrix for matrix in matrices if matrix.shape[-1] == inputs]
        places = [(view, index) for view in views for index in product(*map(range, view.shape[:-1]))]
        rows = torch.cat([view.reshape(-1, inputs).float() for view in views])
        for weight in (weight for weight in quantized if weight.shape[1] == inputs):
            real = weight[weight.abs().sum(1) > 0]  # the vocabulary may be padded
            distances, nearest = torch.cdist(real, rows).min(1)
            assert (distances < 0.4 * real.norm(dim=1)).all(), "a quantized row that is no row of the checkpoint"
            for row, place in zip(real, nearest.tolist(), strict=True):
                view, index = places[place]
                view[index] = row


def untie(model: Any) -> None:
    """A quantized head is a tensor of its own, beside the embedding."""
    head = model.get_output_embeddings()
    if head is not None:
        head.weight = nn.Parameter(head.weight.data.clone())
