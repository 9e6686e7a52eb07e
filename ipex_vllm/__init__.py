"""FastChat model workers on vLLM, with ipex-llm's low-bit weights, for Intel CPUs and GPUs."""

__version__ = "0.1.0"
