"""Low-bit weights, quantized on load."""

from typing import Any


def vllm_arguments(low_bit: str, model_path: str, device: str) -> dict[str, Any]:
    dtypes = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    if low_bit not in dtypes:
        raise ValueError(f"{low_bit!r} is not built yet; there are {', '.join(dtypes)}")
    return {"dtype": dtypes[low_bit]}
