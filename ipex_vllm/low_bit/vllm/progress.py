"""What is seen of loading: a bar, and the kernels in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tqdm import tqdm
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ipex_vllm.low_bit.experts import LowBitExperts
from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.linear import summarize
from ipex_vllm.low_bit.recipe import summarize_kept
from ipex_vllm.low_bit.vllm.packed_cache import PackedCache
from ipex_vllm.machine.memory import give_memory_back

# vLLM configures the loggers below its own name only.
logger = init_logger(f"vllm.{__name__}")


class Progress:
    """A bar over the layers being quantized, on the first rank, and at its end a line for each kernel in use.

    Another one for each reason why layers stay as they are."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.expected = 0
        self.num_finished = 0
        self.bar: tqdm[Any] | None = None
        self.finished: list[LowBitLinear | LowBitExperts] = []
        self.kept: list[tuple[str, str]] = []
        self.cache: PackedCache | None = None

    def expect_layer(self) -> None:
        self.expected += 1

    def keep_layer(self, name: str, reason: str) -> None:
        """Note a layer that stays as it is."""
        self.kept.append((name, reason))

    def report_kept_layers(self) -> None:
        """Say once, when the model is loaded, which layers stay as they are."""
        for line in summarize_kept(self.kept):
            logger.info("%s", line)
        self.kept.clear()

    def finish_head(self, linear: LowBitLinear) -> None:
        """Note an output head that is no layer of its own."""
        self.finished.append(linear)

    def finish_layer(self, *layers: LowBitLinear | LowBitExperts) -> None:
        """Note a layer, whose parts may have kernels of their own."""
        if self.bar is None:
            is_first_rank = get_tensor_model_parallel_rank() == 0
            self.bar = tqdm(total=self.expected, desc=f"Loading {self.name}", unit="layer", disable=not is_first_rank)
        self.bar.update()
        self.num_finished += 1
        self.finished += layers
        if self.num_finished == self.expected:
            self.bar.close()
            self.report_kernels(self.finished)
            self.finished.clear()
            self.report_kept_layers()
            if self.cache is not None:
                self.cache.finish()
            give_memory_back()

    def report_kernels(self, layers: Sequence[LowBitLinear | LowBitExperts]) -> None:
        for line in summarize(layers):
            logger.info("%s", line)


class CheckpointProgress(Progress):
    """For a checkpoint that another tool has quantized: its end also says how to leave that to vLLM's own kernels."""

    latest: ClassVar[CheckpointProgress | None] = None

    @classmethod
    def of_the_model(cls) -> CheckpointProgress:
        """That of the model being built."""
        config = get_current_vllm_config_or_none()
        if cls.latest is None or cls.latest.config is not config:
            cls.latest = cls(config)
        return cls.latest

    def __init__(self, config: object) -> None:
        super().__init__("quantized layers")
        self.config = config

    def report_kernels(self, layers: Sequence[LowBitLinear | LowBitExperts]) -> None:
        super().report_kernels(layers)
        rounds = any(layer.format.kind != "float8" for layer in layers)
        activations = ", times activations rounded to 8 bits in groups of inputs" if rounds else ""
        logger.info(
            "these are the checkpoint's own codes%s; --upstream-kernels leaves it to vLLM's own kernels", activations
        )
