"""What is seen of loading: a bar, and the kernels in use."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ipex_vllm.low_bit.formats import Format
from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.linear import summarize
from ipex_vllm.low_bit.memory import trim_heap

# vLLM configures the loggers below its own name only.
logger = init_logger(f"vllm.{__name__}")


class Progress:
    """A bar over the layers being quantized, on the first rank, and at its end one line per kernel in use."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self.expected = 0
        self.bar: tqdm[Any] | None = None
        self.finished: list[LowBitLinear] = []

    def expect_layer(self) -> None:
        self.expected += 1

    def finish_layer(self, linear: LowBitLinear) -> None:
        if self.bar is None:
            is_first_rank = get_tensor_model_parallel_rank() == 0
            self.bar = tqdm(
                total=self.expected, desc=f"Loading {self.format.name}", unit="layer", disable=not is_first_rank
            )
        self.bar.update()
        self.finished.append(linear)
        if len(self.finished) == self.expected:
            self.bar.close()
            for line in summarize(self.finished):
                logger.info("%s", line)
            self.finished.clear()
            trim_heap()
