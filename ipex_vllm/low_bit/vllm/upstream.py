"""Faults of the pinned vLLM, mended in each of its processes. A test of each fails once upstream needs it no more."""

from __future__ import annotations

import torch
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable


def mend() -> None:
    """Mend all of them."""
    allow_amx()
    load_compiled()


def allow_amx() -> None:
    """Ask the kernel for AMX's registers, without which its instructions end the process (SIGILL).

    vLLM 0.32 chooses AMX for its attention in bfloat16 and leaves the asking to oneDNN, which does so at the first
    matmul that it computes with AMX: none, where layers are small or our kernels compute them.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def load_compiled() -> None:
    """Let a start load the model that an earlier one compiled (VLLM_USE_AOT_COMPILE).

    On CPUs vLLM 0.32 compiles by PyTorch's own inductor, and what that returns is ready as soon as it is read. On
    loading it vLLM calls `finalize_loading` all the same, which only its own kind of compiled code has.
    """

    def finalize_loading(self: BundledAOTAutogradSerializableCallable, config: object) -> None:
        """Nothing is left to load."""

    BundledAOTAutogradSerializableCallable.finalize_loading = finalize_loading  # type: ignore[attr-defined]
