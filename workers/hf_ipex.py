"""`--ipex`: Intel's extension for PyTorch optimizes the model. Its last release is 2.8, for PyTorch 2.8 only."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ipex_vllm.errors import EngineError, OptionError
from ipex_vllm.low_bit.completeness import check_loaded, loading_report
from ipex_vllm.options import WorkerOptions

LOW_BIT_FORMATS = ("bf16", "fp32", "sym_int8", "sym_int4")
GROUP_SIZE = 32  # inputs that share a scale, as everywhere under these names; the extension's own default is all


def require_ipex() -> Any:
    """The extension. Raises EngineError where it is not installed."""
    # Otherwise it compiles its sampling at the first request, for which there has to be a C++ compiler.
    os.environ.setdefault("DISABLE_IPEX_SAMPLE", "1")
    try:
        import intel_extension_for_pytorch as ipex
    except ImportError as error:
        raise EngineError(
            f"--ipex: Intel's extension for PyTorch is not installed here ({' '.join(str(error).split())}). It needs "
            "PyTorch 2.8: run `make env-ipex`, then start the worker with .venv-ipex/bin/python (docs/engines.md)"
        ) from error
    return ipex


def check_for_ipex(options: WorkerOptions) -> None:
    """Raise OptionError for what the extension does not do, and EngineError where it is not installed."""
    if options.device != "cpu":
        raise OptionError(f"--ipex: on --device cpu only, not on {options.device}")
    for flag, wish in (("--low-bit-head", options.low_bit_head), ("--low-bit-outer", options.low_bit_outer)):
        if wish is not None:
            raise OptionError(f"{flag}: with --ipex all layers have one format")
    require_ipex()
    if options.low_bit not in (None, *LOW_BIT_FORMATS):
        raise OptionError(f"--low-bit {options.low_bit}: with --ipex there are {', '.join(LOW_BIT_FORMATS)}")


def load_with_ipex(model_path: str, low_bit: str | None, trust_remote_code: bool) -> Any:
    """Load and optimize, in bfloat16 unless `low_bit` says otherwise. Raises EngineError."""
    ipex = require_ipex()
    if low_bit in (None, "bf16") and not ipex._C.onednn_has_bf16_support():
        raise EngineError(
            "--ipex: the extension has bfloat16 only on CPUs with AVX-512 or AVX-NE-CONVERT, and this one has neither; "
            "choose --low-bit fp32, sym_int8 or sym_int4"
        )
    dtype = torch.float32 if low_bit == "fp32" else torch.bfloat16
    quantization = weights_only(ipex, low_bit) if low_bit in ("sym_int8", "sym_int4") else None
    # Transformers' name for it in the releases that the extension supports.
    model, report = AutoModelForCausalLM.from_pretrained(
        model_path, torch_dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    check_loaded(model_path, *loading_report(report))
    optimized = ipex.llm.optimize(model.eval(), dtype=dtype, quantization_config=quantization, inplace=True)
    is_quantized = any(isinstance(layer, ipex.nn.modules.WeightOnlyQuantizedLinear) for layer in optimized.modules())
    if quantization is not None and not is_quantized:  # it has only logged that it does not
        raise EngineError(f"--low-bit {low_bit}: the extension does not quantize a {type(model).__name__}")
    return optimized


def weights_only(ipex: Any, low_bit: str) -> Any:
    """How to quantize the weights alone; activations stay in bfloat16."""
    quantization = ipex.quantization
    return quantization.get_weight_only_quant_qconfig_mapping(
        weight_dtype=quantization.WoqWeightDtype.INT8 if low_bit == "sym_int8" else quantization.WoqWeightDtype.INT4,
        lowp_mode=quantization.WoqLowpMode.BF16,
        group_size=GROUP_SIZE,
        weight_qscheme=quantization.WoqWeightQScheme.SYMMETRIC,
    )
