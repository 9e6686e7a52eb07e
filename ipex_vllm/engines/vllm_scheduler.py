"""No stream waits long for another's prompt: vLLM's schedulers, with a step's tokens bounded by the time they take.

On a CPU a prompt of 2000 tokens is seconds of arithmetic. vLLM cuts prompts into steps by a number of tokens; here that
number follows the measured speed, while streams run beside the prompt, and is vLLM's own while none does.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

FIRST_PROMPT_TOKENS = 128  # of a step, until one was measured
LEAST_PROMPT_TOKENS = 16  # so that a prompt gets on whatever the machine's speed
MEASURED_TOKENS = 32  # in shorter steps, what does not depend on the number of tokens takes most of the time
NEWEST_SHARE = 0.5  # of the newest step in the mean speed
AIMED_SHARE = 2 / 3  # of the longest gap: half of the steps take longer than the mean speed says


class Pace:
    """How many tokens a step may have so that it ends in time."""

    def __init__(self, max_gap: float) -> None:
        self.max_gap = max_gap  # seconds
        self._tokens_per_s: float | None = None

    def measure(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        if num_tokens < MEASURED_TOKENS or seconds <= 0:
            return
        newest = num_tokens / seconds
        mean = newest if self._tokens_per_s is None else self._tokens_per_s
        self._tokens_per_s = mean + NEWEST_SHARE * (newest - mean)

    def budget(self, num_streams: int) -> int:
        """Tokens of a step in which `num_streams` get their next one and the rest is prompts'."""
        if self._tokens_per_s is None:
            return num_streams + FIRST_PROMPT_TOKENS
        return max(int(self._tokens_per_s * self.max_gap * AIMED_SHARE), num_streams + LEAST_PROMPT_TOKENS)


class _Paced:
    """What is added to either of vLLM's schedulers."""

    def __init__(self, *arguments: Any, max_gap: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        scheduler: Any = self
        self._most_tokens = scheduler.max_num_scheduled_tokens
        self._pace = Pace(max_gap)
        self._last_end = 0.0

    def schedule(self, *arguments: Any, **options: Any) -> Any:
        scheduler: Any = self
        streams = [request for request in scheduler.running if not request.is_prefill_chunk]
        has_prompts = len(streams) < len(scheduler.running) or len(scheduler.waiting) > 0
        budget = self._most_tokens
        if streams and has_prompts:
            budget = max(self._pace.budget(len(streams)), len(streams) + self._longest_picture())
        scheduler.max_num_scheduled_tokens = min(budget, self._most_tokens)
        output = super().schedule(*arguments, **options)  # type: ignore[misc]
        output.ipex_vllm_begin = time.monotonic()
        return output

    def _longest_picture(self) -> int:
        """Tokens of a prompt that have to be in one step: a smaller budget would keep it waiting for all streams."""
        scheduler: Any = self
        if not scheduler.scheduler_config.disable_chunked_mm_input:
            return 0
        prompts = [*scheduler.waiting, *(request for request in scheduler.running if request.is_prefill_chunk)]
        return max((picture.mm_position.length for prompt in prompts for picture in prompt.mm_features), default=0)

    def update_from_output(self, scheduler_output: Any, *arguments: Any, **options: Any) -> Any:
        # A step that was scheduled while the one before it ran begins when that has ended.
        begin, self._last_end = max(scheduler_output.ipex_vllm_begin, self._last_end), time.monotonic()
        self._pace.measure(scheduler_output.total_num_scheduled_tokens, self._last_end - begin)
        return super().update_from_output(scheduler_output, *arguments, **options)  # type: ignore[misc]


class PacedScheduler(_Paced, Scheduler):  # type: ignore[misc]
    pass


class PacedAsyncScheduler(_Paced, AsyncScheduler):  # type: ignore[misc]
    pass


def pace_steps(config: Any, max_gap: float) -> None:
    """Let an engine with this `config` of vLLM's keep a running stream's tokens at most about `max_gap` seconds apart.

    Nothing is changed where that is 0, where vLLM does not cut prompts (some models with MLA), and where the user chose
    a scheduler.
    """
    scheduler = config.scheduler_config
    own = {Scheduler: PacedScheduler, AsyncScheduler: PacedAsyncScheduler}.get(scheduler.get_scheduler_cls())
    if max_gap > 0 and own is not None and scheduler.enable_chunked_prefill:
        scheduler.scheduler_cls = partial(own, max_gap=max_gap)
