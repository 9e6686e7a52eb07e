"""What each weight format does to a model's answers: `python -m benchmarks.accuracy [--models smollm2 demo]`.

Against the same model in float32 on Transformers: the ratio of perplexities, the divergence (Kullback and Leibler's, of
the next token, in nats), and how often the most probable token is the same. Through the kernels that serve: on
Transformers in float32, on vLLM in the dtype that the worker takes by default. `--parts` tells what the weights, the
head and the activations cost, each alone. Prints a line a measurement and, as the last line of its output, all of them
as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy import peers
from benchmarks.accuracy.real_model import write_checkpoint
from benchmarks.accuracy.score import Reference, Score, question_windows, score_transformers, text_windows
from benchmarks.accuracy.vllm_logits import score_vllm
from benchmarks.machine import describe_machine
from benchmarks.options import run_main
from ipex_vllm.demo import resolve_model_path
from ipex_vllm.low_bit import importance, vllm_arguments
from ipex_vllm.low_bit.formats import FORMATS, Format, resolve
from ipex_vllm.low_bit.hf import quantize_model
from ipex_vllm.low_bit.quantize import dequantize, quantize
from ipex_vllm.low_bit.recipe import Storage, on_load

MODELS = ("smollm2", "smollm2-dithered", "demo")
CACHE = Path(".cache/models")
QUANTIZED = [row.name for row in FORMATS.values() if row.kind != "dtype"]


def open_float32(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def model_path(name: str) -> str:
    """The directory of one of `MODELS`, made when it is not there, or `name` itself."""
    if not name.startswith("smollm2"):
        return resolve_model_path(name)
    folder = CACHE / name
    if not (folder / "config.json").exists():
        write_checkpoint(folder, dithered=name.endswith("dithered"))
    return str(folder)


def windows_of(name: str, path: str, num_windows: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if name != "demo":
        return text_windows(tokenizer, num_windows)
    from ipex_vllm.demo.evaluate import load_examples, prompt_and_answer_ids

    questions = [prompt_and_answer_ids(tokenizer, example)[0] for example in load_examples(40)]
    return question_windows(questions, num_windows)


def round_weights(model: Any, format: Format, chosen: Callable[[bool], bool]) -> None:
    """Round the weights of the linear layers for which `chosen(is_head)`, as on load, and keep them in float32."""
    recipe, head, weights = on_load(format), model.get_output_embeddings(), importance.measure(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and chosen(module is head):
            storage = recipe.storage(name, module.in_features, is_head=module is head)
            if isinstance(storage, Storage):
                rounded = dequantize(
                    quantize(module.weight.detach(), storage.format, storage.group_size or 0, weights.get(name))
                )
                module.weight = nn.Parameter(rounded, requires_grad=False)


def measurements(
    name: str, path: str, format: Format, folder: Path, engines: list[str], has_parts: bool
) -> Iterator[tuple[str, Score]]:
    """Each measurement of one format, with its name."""
    reference = Reference(folder)
    if has_parts:
        for part, chosen in (("weights alone", lambda is_head: not is_head), ("head alone", lambda is_head: is_head)):
            model = open_float32(path)
            round_weights(model, format, chosen)
            yield part, score_transformers(model, reference)
        model = open_float32(path)
        round_weights(model, format, lambda _: True)
        with tempfile.TemporaryDirectory() as rounded:
            exact = Reference.write(Path(rounded), model, reference.windows)
            yield "activations alone", score_transformers(quantize_model(open_float32(path), format.name), exact)
    if "transformers" in engines:
        yield "transformers", score_transformers(quantize_model(open_float32(path), format.name), reference)
    if "vllm" in engines:
        arguments = {"model": path, **vllm_arguments(format.name, path, "cpu")}
        yield "vllm", score_vllm(folder, arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2"], help=f"{', '.join(MODELS)}, or a directory")
    parser.add_argument("--formats", nargs="*", default=QUANTIZED, help="default: all that quantize")
    parser.add_argument("--engines", nargs="*", default=["transformers", "vllm"], choices=["transformers", "vllm"])
    parser.add_argument("--parts", action="store_true", help="tell what weights, head and activations cost")
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens; of 64 for the demo model")
    parser.add_argument("--peers", nargs="*", default=[], choices=peers.PEERS, help="other engines to measure")
    parser.add_argument("--out", type=Path, help="write all of it as JSON there")
    options = parser.parse_args()
    machine = describe_machine()
    rows: list[dict[str, Any]] = []

    def add(model: str, format: str, what: str, score: Score) -> None:
        rows.append({"model": model, "format": format, "what": what, **score.row()})
        numbers = score.row()
        print(
            f"{model:17} {format:12} {what:18} perplexity x {numbers['perplexity_ratio']:.4f}  "
            f"KL {numbers['kl']:.4f}  same top token {100 * numbers['same_top_token']:.1f} %",
            flush=True,
        )

    try:
        for name in options.models:
            path = model_path(name)
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                original = open_float32(path)
                reference = Reference.write(folder, original, windows_of(name, path, options.windows))
                print(f"{name}: {reference.windows.numel()} tokens, perplexity {reference.perplexity():.2f}")
                del original
                for format in map(resolve, options.formats):
                    for what, score in measurements(name, path, format, folder, options.engines, options.parts):
                        add(name, format.name, what, score)
                for peer in options.peers:
                    try:
                        for what, score in peers.scores(peer, path, folder):
                            add(name, what, peer, score)
                    except RuntimeError as error:  # a format that it has no kernel for on this CPU
                        print(f"{peer}: {str(error).strip().splitlines()[-1]}", flush=True)
    finally:  # what was measured is kept whatever became of the rest
        result = json.dumps({"kind": "accuracy", "windows": options.windows, "rows": rows, "machine": machine})
        if options.out:
            options.out.write_text(result + "\n")
        print(result)
    return 0


if __name__ == "__main__":
    run_main(main)
