"""FastChat model workers on vLLM, with ipex-llm's low-bit weights, for Intel CPUs and GPUs."""

from ipex_vllm import torchvision_operators

__version__ = "0.1.0"

torchvision_operators.install()
