"""vLLM's view of the low-bit formats: called by vLLM in each of its processes, through `vllm.general_plugins`."""


def register() -> None:
    """Register one quantization config class per low-bit format with vLLM."""
