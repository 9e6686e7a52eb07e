"""`--ipex`: Intel's extension for PyTorch optimizes the model. Its last release is 2.8, for PyTorch 2.8 only."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ipex_vllm.engine import EngineError

LOW_BIT_FORMATS = ("bf16", "sym_int8", "sym_int4")  # the last two are weights only, in the extension's own groups


def require_ipex() -> Any:
    """The extension. Raises EngineError where it is not installed."""
    try:
        import intel_extension_for_pytorch as ipex
    except ImportError as error:
        raise EngineError(
            f"--ipex: Intel's extension for PyTorch is not installed here ({' '.join(str(error).split())}). It needs "
            "PyTorch 2.8, in an environment of its own (`make env-ipex`), and does not serve yet: see docs/engines.md."
        ) from error
    return ipex


def load_with_ipex(model_path: str, low_bit: str | None, trust_remote_code: bool) -> Any:
    """Load in bfloat16 and optimize, with weights in the extension's own int8 or int4. Raises EngineError."""
    ipex = require_ipex()
    if low_bit not in (None, *LOW_BIT_FORMATS):
        raise EngineError(f"--low-bit {low_bit}: with --ipex there are {', '.join(LOW_BIT_FORMATS)}")
    quantization = None
    if low_bit in ("sym_int8", "sym_int4"):
        dtypes = ipex.quantization.WoqWeightDtype
        quantization = ipex.quantization.get_weight_only_quant_qconfig_mapping(
            weight_dtype=dtypes.INT8 if low_bit == "sym_int8" else dtypes.INT4,
            lowp_mode=ipex.quantization.WoqLowpMode.BF16,
        )
    # Transformers' name for it in the releases that the extension supports.
    model = AutoModelForCausalLM.from_pretrained(
        model_path, torch_dtype=torch.bfloat16, trust_remote_code=trust_remote_code
    )
    return ipex.llm.optimize(
        model.eval(), dtype=torch.bfloat16, quantization_config=quantization, inplace=True, deployment_mode=False
    )
