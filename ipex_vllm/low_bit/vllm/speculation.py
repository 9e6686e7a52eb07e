"""Speculative decoding of the pinned vLLM, mended: every request is served and sampled as without drafts.

vLLM 0.32 refuses `min_p` and `logit_bias` when it speculates, since its check of drafts does not know them; where the
refusal is passed by, it drops them. Here such a request has no drafts, and without these all of its sampler applies.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.sample import logits_processor
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
from vllm.v1.spec_decode.metrics import SpecDecodingProm

RUNNER = "vllm.v1.worker.gpu_model_runner"

refuse_what_drafts_do_not_know = SamplingParams._validate_spec_decode
build_logitsprocs = logits_processor.build_logitsprocs
make_scheduler = Scheduler.__init__
take_drafts = Scheduler.update_draft_token_ids
leave_room_for_drafts = AsyncScheduler._update_after_schedule
make_counters = SpecDecodingProm.__init__
count = SpecDecodingProm.observe


def mend() -> None:
    SamplingParams._validate_spec_decode = accept
    Scheduler.__init__ = make_scheduler_that_pads_nothing
    Scheduler.update_draft_token_ids = take_drafts_that_can_be_checked
    AsyncScheduler._update_after_schedule = leave_room_for_drafts_that_can_be_checked
    SpecDecodingProm.__init__, SpecDecodingProm.observe = make_counters_by_position, count_by_position
    logits_processor.build_logitsprocs = build_all_logitsprocs
    if (runner := sys.modules.get(RUNNER)) is not None:
        runner.build_logitsprocs = build_all_logitsprocs  # type: ignore[attr-defined]


def accept(self: SamplingParams, speculative_config: Any) -> None:
    """Nothing is refused: see `can_check_drafts`."""


def can_check_drafts(request: Any) -> bool:
    """Whether vLLM's check of drafts draws from what this request of its scheduler asks for."""
    params = request.sampling_params
    return params is None or not (params.min_p or params.logit_bias)


def make_scheduler_that_pads_nothing(self: Scheduler, *arguments: Any, **options: Any) -> None:
    """A scheduler that gives no stream rows for drafts that it does not have.

    Upstream does for a prompt that is cached but for its last token, so that CUDA's graphs fit: on a CPU these rows are
    computed in vain, and the token is drawn from one of them, as if its request asked for neither `min_p` nor
    `logit_bias`.
    """
    make_scheduler(self, *arguments, **options)
    if self.num_spec_tokens and self.dynamic_sd_lookup is None:  # with a length for each batch size it pads nothing
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)


def take_drafts_that_can_be_checked(self: Scheduler, draft_token_ids: Any) -> None:
    take_drafts(self, draft_token_ids)
    for request_id in draft_token_ids.req_ids:
        request = self.requests.get(request_id)
        if request is not None and not can_check_drafts(request):
            request.spec_token_ids = []


def leave_room_for_drafts_that_can_be_checked(self: AsyncScheduler, scheduler_output: Any) -> None:
    leave_room_for_drafts(self, scheduler_output)
    for request_id in scheduler_output.num_scheduled_tokens:
        request = self.requests[request_id]
        if not can_check_drafts(request):
            request.spec_token_ids = []


def build_all_logitsprocs(
    vllm_config: Any, device: Any, is_pin_memory: bool, is_pooling_model: bool, custom_logitsprocs: Any = ()
) -> LogitsProcessors:
    """The processors of logits, with those that upstream leaves out when it speculates.

    Called while a worker makes its model runner, whose module is imported by then: this is when the runner is mended.
    """
    mend_runner()
    built = build_logitsprocs(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
    if vllm_config.speculative_config is None or is_pooling_model:
        return built
    return LogitsProcessors(kind(vllm_config, device, is_pin_memory) for kind in BUILTIN_LOGITS_PROCESSORS)


def mend_runner() -> None:
    """Mend what a worker imports after vLLM's plugins; a second call changes nothing."""
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if current_platform.is_cpu():
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    if GPUModelRunner._sample.__module__ == __name__:
        return
    check_and_sample = GPUModelRunner._sample

    def sample(self: GPUModelRunner, logits: Any, spec_decode_metadata: Any) -> Any:
        """Without drafts the next tokens are drawn as without speculation, which copies no logits."""
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            spec_decode_metadata = None
        return check_and_sample(self, logits, spec_decode_metadata)

    GPUModelRunner._sample = sample


class NoDrafts:
    """What drafts in the worker, for vLLM's method `custom_class`, where its scheduler looks drafts up: nothing."""

    def __init__(self, config: Any) -> None:
        """Called by vLLM with its config."""

    def load_model(self, *_: Any) -> None:
        """There is none."""

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        return [[] for _ in sampled_token_ids]


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """For each draft token [num_tokens] its stream's entry of `x` [streams]: a temperature, a top-p, a top-k.

    Upstream's operator for CPUs writes into a copy, and what it returns is whatever was in memory: sampled texts, and
    greedy ones beside them, were others than without drafts.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return values.repeat_interleave(counts, output_size=num_tokens)


def make_counters_by_position(
    self: SpecDecodingProm,
    speculative_config: Any,
    labelnames: list[str],
    per_engine_labelvalues: dict[int, list[Any]],
    *others: Any,
    **options: Any,
) -> None:
    """Prometheus' counters with the drafted tokens by their position: upstream has only the accepted ones so.

    Drafts of one length would not need it; these are as long as they pay.
    """
    make_counters(self, speculative_config, labelnames, per_engine_labelvalues, *others, **options)
    self.drafted_by_position = {}
    if speculative_config is not None:
        counter = self._counter_cls(
            name="vllm:spec_decode_num_draft_tokens_per_pos",
            documentation="Draft tokens per position.",
            labelnames=[*labelnames, "position"],
        )
        positions = range(speculative_config.num_speculative_tokens)
        self.drafted_by_position = {
            engine: [counter.labels(*values, str(position)) for position in positions]
            for engine, values in per_engine_labelvalues.items()
        }


def count_by_position(self: SpecDecodingProm, spec_decoding_stats: Any, engine_idx: int = 0) -> None:
    count(self, spec_decoding_stats, engine_idx)
    counters = self.drafted_by_position.get(engine_idx, ())
    for counter, drafted in zip(counters, spec_decoding_stats.num_draft_tokens_per_pos, strict=False):
        counter.inc(drafted)
