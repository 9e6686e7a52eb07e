"""The engines of `--engine`. Each module imports a model library's world, so it is imported when it is chosen."""

from __future__ import annotations

from collections.abc import Callable

from ipex_vllm.engines.engine import Engine

EngineLoader = Callable[[], type[Engine]]


def load_vllm() -> type[Engine]:
    from ipex_vllm.engines.vllm import VllmEngine

    return VllmEngine


def load_ipex_llm() -> type[Engine]:
    from ipex_vllm.engines.ipex_llm import IpexLlmEngine

    return IpexLlmEngine


ENGINES: dict[str, EngineLoader] = {"vllm": load_vllm, "ipex-llm": load_ipex_llm}
