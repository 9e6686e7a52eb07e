"""The ways in which Transformers generates: `python -m benchmarks.hf_modes --model-path DIR [--low-bit sym_int4]`.

In one process: a growing cache (what the worker uses), a static one, and a static one with the decoding step compiled
by `torch.compile`, as `generate` itself does on accelerators. A static cache holds --cache tokens; a worker's has
to hold the whole context, since each length is compiled anew. The ways take turns, --rounds times. Prints a table and,
as the last line of its output, the same as JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, GenerationConfig, StaticCache

from benchmarks.load.output import number, print_json_line, print_table
from benchmarks.machine import describe_machine
from ipex_vllm.low_bit.hf import quantize_model
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.plan import cpu

MODES = ("growing cache", "static cache", "static cache, compiled")


@torch.inference_mode()
def generate(model: Any, mode: str, prompt: torch.Tensor, num_tokens: int, cache_tokens: int) -> float:
    """Generate greedily; return the seconds it took."""
    started = time.perf_counter()
    config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, disable_compile=True)
    if mode == "growing cache":
        cache: Any = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=cache_tokens)
    if mode == "static cache, compiled":
        config.disable_compile = False
        config.compile_config = CompileConfig(mode="default")
        config.compile_config._compile_all_devices = True  # `generate` compiles on accelerators only
    model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, generation_config=config)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--low-bit", default="bf16", help="format of the weights")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens to generate")
    parser.add_argument("--cache", type=int, default=2048, help="tokens that a static cache holds")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cpu.apply(MachineFacts.probe())  # as the worker does
    machine = describe_machine()
    model = AutoModelForCausalLM.from_pretrained(options.model_path, dtype=torch.bfloat16).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    quantize_model(model, options.low_bit)
    prompt = torch.randint(3, model.config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    first = {mode: generate(model, mode, prompt, options.output, options.cache) for mode in MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(options.rounds):
        for mode in MODES:
            seconds[mode].append(generate(model, mode, prompt, options.output, options.cache))
    speeds = {mode: options.output / statistics.median(values) for mode, values in seconds.items()}
    rows = [
        [mode, number(speeds[mode]), f"{speeds[mode] / speeds[MODES[0]]:.2f}", number(first[mode])] for mode in MODES
    ]
    title = f"{options.low_bit}, {options.prompt} tokens in, {options.output} out, a cache of {options.cache}"
    print_table(title, ["way", "output tok/s", "to the first", "first request, s"], rows)
    print_json_line({**vars(options), "seconds": seconds, "first_s": first, "machine": machine})
    return 0
