"""Faults of the pinned vLLM, mended in each of its processes. A test of each fails once upstream needs it no more."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import socket
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import VecISA
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.layers.activation import XIELU
from vllm.model_executor.layers.fused_moe.router import cpu_router
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.v1.sample import sampler

from ipex_vllm import low_bit
from ipex_vllm.low_bit.vllm import (
    alike_layers,
    attention,
    compile_beside,
    json_strings,
    picture_attention,
    sixteen_bits,
    speculation,
)
from ipex_vllm.low_bit.vllm.config import LowBitConfig

T = TypeVar("T")

rotate = RotaryEmbedding.forward_cpu
route = cpu_router.CPURouter._compute_routing
make_embedding = VocabParallelEmbedding.__init__
rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")  # the package gives a function that name
make_store = rendezvous._create_c10d_store
make_xielu = XIELU.__init__
probe = VecISA.check_build
convolve = gdn_attention._causal_conv1d_fwd_cpu
rank_compiled = sampler.batched_count_greater_than
hash_config = VllmConfig.compute_hash
call_elsewhere = registry._run_in_subprocess


def mend() -> None:
    """Mend all of them; a second call changes nothing."""
    load_compiled()
    VllmConfig.compute_hash = hash_config_and_code
    VecISA.check_build = ask_compiler  # type: ignore[method-assign]
    rendezvous._create_c10d_store = create_store
    json_strings.mend()
    speculation.mend()
    VocabParallelEmbedding.__init__ = make_embedding_with_config
    XIELU.__init__ = make_xielu_in_models_dtype
    if current_platform.is_cpu():
        allow_amx()
        alike_layers.mend()
        attention.mend()
        compile_beside.mend()
        registry._run_in_subprocess = call_here
        picture_attention.mend()
        sixteen_bits.mend()
        RotaryEmbedding.forward_cpu = rotate_heads
        gdn_attention._causal_conv1d_fwd_cpu = convolve_even_one
        cpu_router.CPURouter._compute_routing = route_with_bias
        # Compiled at the first request that asks for log probabilities, for three seconds in which no stream goes on.
        sampler.batched_count_greater_than = rank_compiled._torchdynamo_orig_callable


def allow_amx() -> None:
    """Ask the kernel for AMX's registers, without which its instructions end the process (SIGILL).

    vLLM 0.32 chooses AMX for its attention in bfloat16 and leaves the asking to oneDNN, which does so at the first
    matmul that it computes with AMX: none, where layers are small or our kernels compute them.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def create_store(
    hostname: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: bool = True
) -> Store:
    """The store by which several hosts find together, listening at its address alone.

    PyTorch 2.13 listens on every address of host 0, and whoever reaches the store can write into it.
    """
    if rank > 0:
        store: Store = make_store(hostname, port, rank, world_size, timeout, use_libuv)
        return store
    family, _, _, _, address = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM)[0]
    return TCPStore(
        hostname,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        use_libuv=use_libuv,
        master_listen_fd=socket.create_server(address, family=family).detach(),
    )


def load_compiled() -> None:
    """Let a start load the model that an earlier one compiled (VLLM_USE_AOT_COMPILE).

    On CPUs vLLM 0.32 compiles by PyTorch's own inductor, and what that returns is ready as soon as it is read. On
    loading it vLLM calls `finalize_loading` all the same, which only its own kind of compiled code has.
    """

    def finalize_loading(self: BundledAOTAutogradSerializableCallable, config: object) -> None:
        """Nothing is left to load."""

    BundledAOTAutogradSerializableCallable.finalize_loading = finalize_loading  # type: ignore[attr-defined]


@functools.wraps(hash_config)
def hash_config_and_code(self: VllmConfig, *arguments: Any, **options: Any) -> str:
    """What a model's compiled code is kept under, with this package's own code in it.

    vLLM looks at the files that were traced when it was compiled. A layer that another version of us computes was not
    traced through our files then, and the code kept would call what this version has not prepared.
    """
    both = f"{hash_config(self, *arguments, **options)} {own_code()}"
    return hashlib.sha256(both.encode()).hexdigest()[:10]


@functools.cache
def own_code() -> str:
    """The digest of all that prepares a model's layers or computes them."""
    sources = (path.read_bytes() for path in sorted(Path(low_bit.__file__).parent.rglob("*.py")))
    return hashlib.sha256(b"\0".join([*sources, str(low_bit.library_digest()).encode()])).hexdigest()


def ask_compiler(self: VecISA, code: str) -> bool:
    """Whether the compiler knows an instruction set, which is all that this PyTorch's wheels leave open.

    PyTorch finds it out by building a library for each, with its headers, and loading that in another process: ten at
    the first start of every model.
    """
    command = [get_cpp_compiler(), *self.build_arch_flags().split(), "-fsyntax-only", "-x", "c++", "/dev/null"]
    return subprocess.run(command, capture_output=True).returncode == 0


def call_here(look: Callable[[], T]) -> T:
    """What vLLM wants to know of a model's class at its first start, looked up here: no GPU is touched by that.

    vLLM has another process look, which imports it once more.
    """
    return look()


def rotate_heads(
    self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotary embedding of queries [tokens, heads, head_size], which upstream's operator takes for another shape.

    So it answered wrongly, in silence, for MLA without yarn (GLM-4.7-Flash) and for LFM2.
    """
    if query.dim() == 3:
        return self.forward_native(positions, query, key)  # type: ignore[no-any-return]
    return rotate(self, positions, query, key)  # type: ignore[no-any-return]


def convolve_even_one(*, x: torch.Tensor, **others: Any) -> torch.Tensor:
    """The convolution of gated linear attention over x [features, tokens], whose operator refuses one token's strides.

    Qwen3.5 died by that at a prompt of one token.
    """
    if x.shape[-1] == 1:
        x = x.as_strided(x.shape, (x.stride(0), x.shape[0]))
    return convolve(x=x, **others)  # type: ignore[no-any-return]


def route_with_bias(
    self: Any,
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    indices_type: torch.dtype | None,
    *,
    input_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token's experts, chosen with the correction bias, which upstream leaves out where experts have no groups.

    ERNIE 4.5 got other experts than its own by that, and MiniMax-M2, with its sigmoid, an assertion.
    """
    is_plain = not self.use_grouped_topk and self.custom_routing_function is None
    has_bias = self.e_score_correction_bias is not None
    if is_plain and (self.scoring_func == "sigmoid" or (self.scoring_func == "softmax" and has_bias)):
        return cpu_router._grouped_topk(  # type: ignore[no-any-return]
            router_logits,
            self.top_k,
            self.renormalize,
            num_expert_group=1,
            topk_group=1,
            scoring_func=self.scoring_func,
            routed_scaling_factor=self.routed_scaling_factor,
            e_score_correction_bias=self.e_score_correction_bias,
        )
    return route(self, hidden_states, router_logits, indices_type, input_ids=input_ids)  # type: ignore[no-any-return]


@functools.wraps(make_embedding)
def make_embedding_with_config(self: Any, *arguments: Any, **options: Any) -> None:
    """An output head that is quantized though its model does not hand the configuration on.

    gpt-oss, Qwen3-Next, Falcon-H1, Mamba 2, OPT and BLOOM do not; nor do Gemma 2 and Cohere, whose embedding it is.
    """
    given = inspect.signature(make_embedding).bind(self, *arguments, **options)
    config = get_current_vllm_config_or_none()
    ours = config.quant_config if config is not None else None
    is_chosen = any(given.arguments.get(name) is not None for name in ("quant_config", "quant_method"))
    if isinstance(ours, LowBitConfig) and not is_chosen:
        given.arguments["quant_config"] = ours
    make_embedding(*given.args, **given.kwargs)


@functools.wraps(make_xielu)
def make_xielu_in_models_dtype(self: Any, *arguments: Any, **options: Any) -> None:
    """Apertus' activation with its two numbers in the dtype that the model computes in.

    Upstream has them in bfloat16 alone, and so the softplus of them, which a model in float32 gets wrong in the third
    digit by that.
    """
    given = inspect.signature(make_xielu).bind(self, *arguments, **options)
    given.arguments.setdefault("dtype", torch.get_default_dtype())
    make_xielu(*given.args, **given.kwargs)
