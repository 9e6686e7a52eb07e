"""vLLM's schedulers with drafts as long as they pay, by `draft_length`, for each stream and each step.

vLLM drafts as many tokens for every stream as it is told once. Here the scheduler, which learns what became of a draft,
tells the worker how many to make for the next step and schedules as many of them as are worth their rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.core.sched.scheduler import Scheduler

from ipex_vllm.engines.draft_length import Acceptance, lengths, proposal
from ipex_vllm.engines.vllm_scheduler import PacedScheduler, pace_steps
from ipex_vllm.plan.plan import Plan


class _Drafting:
    """What is added to a scheduler of vLLM's that is told of drafts before it schedules them (not ahead of them)."""

    def __init__(self, *arguments: Any, step_cost: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._step_cost = step_cost
        self._acceptances: WeakKeyDictionary[Any, Acceptance] = WeakKeyDictionary()

    def schedule(self, *arguments: Any, **options: Any) -> Any:
        output = super().schedule(*arguments, **options)  # type: ignore[misc]
        scheduler: Any = self
        chances = [self._chance(request) for request in self._streams()]
        output.num_spec_tokens_to_schedule = proposal(chances, scheduler.num_spec_tokens, self._step_cost)
        return output

    def update_from_output(self, scheduler_output: Any, model_output: Any) -> Any:
        scheduler: Any = self
        for request_id, draft in scheduler_output.scheduled_spec_decode_tokens.items():
            request = scheduler.requests.get(request_id)
            sampled = model_output.sampled_token_ids[model_output.req_id_to_index[request_id]]
            if request is not None and sampled:
                acceptance = self._acceptances.setdefault(request, Acceptance())
                acceptance.learn(len(draft), len(sampled) - 1, request.num_output_tokens)
        return super().update_from_output(scheduler_output, model_output)  # type: ignore[misc]

    def update_draft_token_ids(self, drafts: Any) -> None:
        super().update_draft_token_ids(drafts)  # type: ignore[misc]
        streams = self._streams()
        limits = [len(request.spec_token_ids) for request in streams]
        if any(limits):
            granted = lengths([self._chance(request) for request in streams], limits)
            for request, length in zip(streams, granted, strict=True):
                request.spec_token_ids = request.spec_token_ids[:length]

    def _streams(self) -> list[Any]:
        """The requests that get a token in each step."""
        scheduler: Any = self
        return [request for request in scheduler.running if not request.is_prefill_chunk]

    def _chance(self, request: Any) -> float:
        acceptance = self._acceptances.get(request)
        return (acceptance or Acceptance()).chance(request.num_output_tokens)


class DraftingScheduler(_Drafting, Scheduler):  # type: ignore[misc]
    pass


class PacedDraftingScheduler(_Drafting, PacedScheduler):
    pass


def choose_scheduler(config: Any, plan: Plan) -> None:
    """Let an engine with this `config` of vLLM's make steps as short as `plan` asks, and drafts as long as they pay.

    Nothing is changed where the user chose a scheduler.
    """
    pace_steps(config, plan.max_stream_gap)
    if plan.speculative == "off":
        return
    scheduler = config.scheduler_config
    chosen = scheduler.get_scheduler_cls()
    if chosen is Scheduler:
        scheduler.scheduler_cls = partial(DraftingScheduler, step_cost=plan.draft_cost)
    elif isinstance(chosen, partial) and chosen.func is PacedScheduler:
        scheduler.scheduler_cls = partial(PacedDraftingScheduler, step_cost=plan.draft_cost, **chosen.keywords)
