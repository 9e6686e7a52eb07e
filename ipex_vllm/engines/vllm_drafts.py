"""vLLM's schedulers with drafts as long as they pay, by `draft_length`, for each stream and each step.

vLLM drafts as many tokens for every stream as it is told once. Here the scheduler, which learns what became of a draft,
schedules as many tokens of it as are worth their rows. It has each stream's text, so it looks drafts up itself: vLLM's
own lookup, in the worker, knows nothing of what pays, and searches in every step. A model drafts in the worker, as many
tokens as it is told to.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds

from ipex_vllm.engines.draft_length import LOOKUPS_CHANCES, MODELS_CHANCE, Acceptance, lengths, proposal
from ipex_vllm.engines.text_lookup import TextLookup
from ipex_vllm.engines.vllm_scheduler import PacedScheduler, pace_steps
from ipex_vllm.low_bit.vllm.speculation import can_check_drafts
from ipex_vllm.plan.plan import Plan


class _Stream:
    """What is kept of a request: how its drafts fared, its text, and how much of that the newest draft rests on."""

    __slots__ = ("acceptance", "match", "text")

    def __init__(self, first_chances: tuple[float, ...]) -> None:
        self.acceptance = Acceptance(first_chances)
        self.text = TextLookup()
        self.match = 1


class _Drafting:
    """What is added to a scheduler of vLLM's that is told of drafts before it schedules them (not ahead of them)."""

    first_chances: tuple[float, ...] = MODELS_CHANCE

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept: WeakKeyDictionary[Any, _Stream] = WeakKeyDictionary()

    def update_from_output(self, scheduler_output: Any, model_output: Any) -> Any:
        scheduler: Any = self
        for request_id, draft in scheduler_output.scheduled_spec_decode_tokens.items():
            request = scheduler.requests.get(request_id)
            sampled = model_output.sampled_token_ids[model_output.req_id_to_index[request_id]]
            if request is not None and sampled:
                kept = self._of(request)
                kept.acceptance.learn(len(draft), len(sampled) - 1, request.num_output_tokens, kept.match)
        return super().update_from_output(scheduler_output, model_output)  # type: ignore[misc]

    def _running(self) -> list[Any]:
        """The requests that get a token in each step."""
        scheduler: Any = self
        return [request for request in scheduler.running if not request.is_prefill_chunk]

    def _of(self, request: Any) -> _Stream:
        kept = self._kept.get(request)
        if kept is None:
            kept = self._kept[request] = _Stream(self.first_chances)
        return kept

    def _chances(self, request: Any, most: int) -> list[float]:
        kept = self._of(request)
        return kept.acceptance.chances(request.num_output_tokens, most, kept.match)


class _ModelDrafting(_Drafting):
    """A model drafts, in the worker."""

    def __init__(self, *arguments: Any, step_cost: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._step_cost = step_cost

    def schedule(self, *arguments: Any, **options: Any) -> Any:
        output = super().schedule(*arguments, **options)  # type: ignore[misc]
        scheduler: Any = self
        chances = [self._chances(request, scheduler.num_spec_tokens) for request in self._running()]
        output.num_spec_tokens_to_schedule = proposal(chances, self._step_cost)
        return output

    def update_draft_token_ids(self, drafts: Any) -> None:
        super().update_draft_token_ids(drafts)  # type: ignore[misc]
        streams = self._running()
        granted = lengths([self._chances(request, len(request.spec_token_ids)) for request in streams])
        for request, length in zip(streams, granted, strict=True):
            request.spec_token_ids = request.spec_token_ids[:length]


class _LookupDrafting(_Drafting):
    """Drafts are looked up in each stream's text."""

    first_chances = LOOKUPS_CHANCES

    def update_draft_token_ids(self, drafts: Any) -> None:
        """vLLM's call after each step; `drafts` is what the worker drafted, nothing."""
        streams = self._running()
        found = [self._look_up(request) for request in streams]
        granted = lengths([self._chances(request, len(draft)) for request, draft in zip(streams, found, strict=True)])
        names = [request.request_id for request in streams]
        wanted = [draft[:length] for draft, length in zip(found, granted, strict=True)]
        super().update_draft_token_ids(DraftTokenIds(names, wanted))  # type: ignore[misc]

    def _look_up(self, request: Any) -> list[int]:
        kept = self._of(request)
        kept.text.extend(request.all_token_ids[kept.text.length :])
        if not can_check_drafts(request):
            return []
        scheduler: Any = self
        # The step yields one token more than its draft has.
        room = min(request.max_tokens - request.num_output_tokens, scheduler.max_model_len - request.num_tokens) - 1
        draft, kept.match = kept.text.draft(min(room, scheduler.num_spec_tokens))
        return draft


class ModelDraftingScheduler(_ModelDrafting, Scheduler):  # type: ignore[misc]
    pass


class PacedModelDraftingScheduler(_ModelDrafting, PacedScheduler):
    pass


class LookupDraftingScheduler(_LookupDrafting, Scheduler):  # type: ignore[misc]
    pass


class PacedLookupDraftingScheduler(_LookupDrafting, PacedScheduler):
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
    is_paced = isinstance(chosen, partial) and chosen.func is PacedScheduler
    if chosen is not Scheduler and not is_paced:
        return
    keywords = chosen.keywords if is_paced else {}
    if plan.speculative == "draft":
        own: type = PacedModelDraftingScheduler if is_paced else ModelDraftingScheduler
        keywords = {**keywords, "step_cost": plan.draft_cost}
    else:
        own = PacedLookupDraftingScheduler if is_paced else LookupDraftingScheduler
    scheduler.scheduler_cls = partial(own, **keywords)
