"""A whole layer of experts on x86 CPUs: packing, and the torch operator over the native int4, int8 and fp8 kernels.

How the operator works is in `docs/kernels.md`.
"""

import torch
from torch import Tensor

from ipex_vllm.low_bit import native
from ipex_vllm.low_bit.kernels import w4a8, w8a8, w8a16
from ipex_vllm.low_bit.quantize import QuantizedWeight

# The formats, by name, and the activations, as csrc/experts/experts.h numbers them. "clamped_swiglu" is gpt-oss':
# gate * sigmoid(1.702 gate) * (up + 1), the gate at most 7, up between -7 and 7.
FORMATS = {"sym_int4": 0, "asym_int4": 1, "nf4": 2, "fp4": 3, "sym_int8": 4, "fp8_e4m3": 5, "fp8_e5m2": 6}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "clamped_swiglu": 3}
MOST_CHOSEN = 64
TILE_OUTPUTS = w4a8.TILE_OUTPUTS


def unavailable_reason() -> str | None:
    """Say in one sentence why the operator cannot run here; None when it can."""
    return native.unavailable_reason() or w4a8.unavailable_reason()


def in_turn(gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up [intermediate, ...] as one tensor [2 * intermediate, ...], 32 rows of each in turn."""
    blocks = [part.reshape(-1, TILE_OUTPUTS, *part.shape[1:]) for part in (gate, up)]
    return torch.stack(blocks, dim=1).flatten(0, 2)


def pack(weight: QuantizedWeight) -> Tensor:
    """One expert's matrix as the operator reads it; uint8 [packed bytes]."""
    if weight.format.bits == 4:
        return w4a8.pack_weight(weight)
    pack_codes = w8a16.pack if weight.format.kind == "float8" else w8a8.pack
    return pack_codes(weight.codes, weight.scales.float())


def forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    gate_up_format: int,
    down_format: int,
    intermediate: int,
    gate_up_group: int,
    down_group: int,
    activation: int,
    isa: int = 0,
) -> Tensor:
    """The weighted sum of what each token's chosen experts make of it, by the operator `ipex_vllm::experts`.

    Inputs of both matmuls are rounded as in `w4a8.linear`, `w8a8.linear` and `w8a16.linear`, the second's from float32.
    A token's result does not depend on the other tokens, the number of threads or, but for fp8 on "avx512_bf16", the
    instruction set.

    Args:
        x: float32, float16 or bfloat16 [tokens, hidden].
        gate_up: uint8 [experts, bytes], each `pack` of weights [2 * intermediate, hidden] in the order of `in_turn`.
        down: uint8 [experts, bytes], each `pack` of weights [hidden, intermediate].
        gate_up_bias: float32 [experts, 2 * intermediate], in the order of `in_turn`, or None.
        down_bias: float32 [experts, hidden], or None.
        weights: float32 [tokens, chosen].
        ids: int32 [tokens, chosen], at most `MOST_CHOSEN`; an id that is none of the experts' is left out.
        gate_up_format, down_format: of `FORMATS`' values, both of integers or both of 8-bit floats.
        intermediate: a multiple of 32.
        gate_up_group, down_group: inputs that share a scale; 0 (8 bits only) for all.
        activation: one of `ACTIVATIONS`' values.
        isa: one of the matmul's `ISAS`, which this CPU must have; 0 is the best one for each expert's rows.

    Returns:
        [tokens, hidden] of x's dtype.

    Raises:
        RuntimeError: a shape or dtype does not fit, or the kernels cannot run here.
    """
    operator = torch.ops.ipex_vllm.experts.default
    tensors = (x, gate_up, down, gate_up_bias, down_bias, weights, ids)
    sizes = (intermediate, gate_up_group, down_group)
    return operator(*tensors, gate_up_format, down_format, *sizes, activation, isa)  # type: ignore[no-any-return]


def _forward_shape(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# The library implements it (csrc/torch_ops.cpp).
torch.library.define(
    "ipex_vllm::experts",
    "(Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, Tensor weights, Tensor ids, "
    "int gate_up_format, int down_format, int intermediate, int gate_up_group, int down_group, int activation, "
    "int isa=0) -> Tensor",
)
torch.library.register_fake("ipex_vllm::experts", _forward_shape)
