"""The settings of one worker, every choice made: the one object that an engine starts with."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace

from ipex_vllm.errors import OptionError
from ipex_vllm.low_bit import choose_format
from ipex_vllm.low_bit.formats import Format
from ipex_vllm.low_bit.sizes import loaded_bytes
from ipex_vllm.machine.facts import GIB
from ipex_vllm.machine.kv_cache import KvCache
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import Device, Speculative, WorkerOptions

DEFAULT_CONTEXT_LENGTH = 2048  # vLLM's, for a model that tells none
MIN_FITTED_CONTEXT = 256  # tokens; a context that was shortened to less than this is of no use

# Interpreter, libraries and activations of the server and engine processes, beyond weights and KV cache.
PROCESS_MEMORY_BYTES = int(2.0 * GIB)


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What an engine's own options ask of the plan.

    Attributes:
        num_ranks: this host's processes of tensor and pipeline parallelism.
        num_hosts: hosts that divide the model among them.
        num_stages: the pipeline's length, over all hosts.
        dtype: what the user told the engine itself to compute in, by PyTorch's name; None leaves it open.
        max_model_len: the context that the user asked for, in tokens; None for the model's own, as far as it fits.
        has_adapters: LoRA adapters, with which nothing is compiled.
        reads_checkpoint: the weights come from the model directory's safetensors or PyTorch files.
        no_speculation: why the engine, as it is asked for, does not check drafts; None where it does.
        takes_own_16_bits: the engine can multiply layers in 16 bits by our kernel.
    """

    num_ranks: int = 1
    num_hosts: int = 1
    num_stages: int = 1
    dtype: str | None = None
    max_model_len: int | None = None
    has_adapters: bool = False
    reads_checkpoint: bool = True
    no_speculation: str | None = "this engine has none"
    takes_own_16_bits: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings, each choice with its reason in `lines`.

    Attributes:
        model_path: directory or Hugging Face name.
        names: names that clients may use.
        low_bit: format of the weights, as chosen by the user or for this machine; None for the checkpoint's own.
        low_bit_head, low_bit_outer: the output head's and the outer layers', where the user chose them.
        low_bit_cache: the folder that keeps quantized weights, "" for the usual one; None where none does.
        upstream_kernels: a checkpoint that is quantized already, or stays in 16 bits, is left to the engine's kernels.
        own_16_bits: layers that stay in 16 bits are multiplied by our kernel, not the engine's.
        rank_cores: for each rank of tensor and pipeline parallelism, the logical CPUs that compute.
        kv_cache_bytes: KV cache of one rank.
        context: what the context is shortened to, in tokens, where the model's own does not fit; None where it does.
        is_kv_cache_estimated: the engine measures what is left for the KV cache, once the model is loaded.
        use_compile: torch.compile the model, or run it eagerly.
        compile_beside: where it is compiled, serve eagerly until that is done.
        memory_share: the share of a GPU's whole memory that the engine may fill; None without GPUs.
        serves_openai: the engine's own application for OpenAI's API is wanted, too.
        speculative: what drafts tokens, resolved: "auto" has become another.
        draft_model: the directory or name of the model that does, where one does.
        draft_cost: of one token of its, as a share of one of the model's: of the weights that are read.
        max_stream_gap: seconds that a running stream may wait for the prompts of others; 0 leaves it to the engine.
        engine_args: the engine's own options, under its own names.
    """

    model_path: str
    names: tuple[str, ...]
    device: Device
    low_bit: str | None
    low_bit_head: str | None = None
    low_bit_outer: str | None = None
    low_bit_cache: str | None = None
    upstream_kernels: bool = False
    own_16_bits: bool = False
    rank_cores: tuple[tuple[int, ...], ...]
    kv_cache_bytes: int
    use_compile: bool
    compile_beside: bool = False
    context: int | None = None
    is_kv_cache_estimated: bool = False
    memory_share: float | None = None
    lines: tuple[str, ...] = ()
    serves_openai: bool = True
    speculative: Speculative = "off"
    draft_model: str | None = None
    draft_cost: float = 0.0
    max_stream_gap: float = 0.0
    engine_args: argparse.Namespace = field(default_factory=argparse.Namespace)


def wanted_context(model: ModelFacts, demands: Demands) -> int:
    """The context to plan for, in tokens. Raises OptionError."""
    if demands.max_model_len is None:
        return model.max_position or DEFAULT_CONTEXT_LENGTH
    if demands.max_model_len < 1:
        raise OptionError(f"--max-model-len {demands.max_model_len}: a context has at least one token")
    return demands.max_model_len


def fitted_context(kv_cache: KvCache, wanted: int, size: int, demands: Demands) -> int | None:
    """The context that `size` bytes of KV cache hold, in tokens, at most `wanted`.

    None where they hold less than was asked for, or, where nothing was, less than is of any use.
    """
    context = kv_cache.longest(size - kv_cache.block_bytes, wanted)
    least = wanted if demands.max_model_len is not None else min(wanted, MIN_FITTED_CONTEXT)
    return context if context >= least else None


def shortened(context: int | None, whole: int) -> int | None:
    """The context that fits, in tokens, where that is known to be less than the `whole` one."""
    return context if context is not None and context < whole else None


def context_line(context: int, whole: int, kv_cache_bytes: int) -> str:
    """What is told where the model's whole context does not fit."""
    return (
        f"context: {context} of the model's {whole} tokens (what {kv_cache_bytes / GIB:.2f} GiB of KV cache hold; "
        "more with more free memory, a smaller --low-bit, or a larger --kv-cache-gib)"
    )


def weight_format(options: WorkerOptions | Plan, device: Device = "cpu") -> Format | None:
    """The row of the format table that --low-bit names. Raises OptionError for a wrong name there or beside it."""
    try:
        return choose_format(options.low_bit, options.low_bit_head, device, options.low_bit_outer)
    except ValueError as error:
        raise OptionError(f"--low-bit: {error}") from error


def weight_bytes(model: ModelFacts, options: WorkerOptions, num_ranks: int = 1) -> int | None:
    """Memory that a host's weights take once loaded, over all its `num_ranks`; None for a model that is not here yet.

    A model that drafts is counted, too. Raises OptionError for an unknown format.
    """
    if model.draft is not None:
        drafts = weight_bytes(model.draft, options, num_ranks)
        own = weight_bytes(replace(model, draft=None), options, num_ranks)
        return None if own is None or drafts is None else own + drafts
    format = weight_format(options)
    if model.weight_bytes is None or format is None or model.is_quantized:
        return model.weight_bytes
    if model.tensors:
        # ipex-llm's engine has formats on GPUs that vLLM has no kernel for.
        device = options.device if format.runs_on_xpu else "cpu"
        whole = loaded_bytes(
            model.tensors,
            format.name,
            head=options.low_bit_head,
            device=device,
            outer=options.low_bit_outer,
            is_tied=model.is_tied,
            num_ranks=num_ranks * model.num_hosts,
        )
        return whole // model.num_hosts
    if format.kind == "dtype":
        return model.weight_bytes * format.bits // 16
    # Codes of 5 and 6 bits take a byte; scales and minima at most a sixteenth of one for each weight.
    bits = 4.5 if format.bits == 4 else 8.5
    quantized = max(model.weight_bytes - model.embedding_bytes, 0)
    return model.weight_bytes - quantized + int(quantized * bits / 16)
