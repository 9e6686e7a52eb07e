"""What of vLLM's speculative decoding is mended, and that vLLM needs it: where it does not any more, it can go."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.utils import cpu_triton_utils as upstreams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.spec_decode.metrics import SpecDecodingStats
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ipex_vllm.low_bit.vllm import speculation

UNKNOWN = [SamplingParams(min_p=0.5), SamplingParams(logit_bias={5: 1.0})]


@pytest.fixture(scope="module", autouse=True)
def mended() -> None:
    speculation.mend()
    speculation.mend_runner()


@pytest.mark.parametrize("params", UNKNOWN, ids=["min_p", "logit_bias"])
def test_what_the_check_of_drafts_does_not_know_is_served_without_drafts(params: SamplingParams) -> None:
    params._validate_spec_decode(SimpleNamespace())
    assert not speculation.can_check_drafts(SimpleNamespace(sampling_params=params))
    assert speculation.can_check_drafts(
        SimpleNamespace(sampling_params=SamplingParams(top_p=0.5, presence_penalty=1.0))
    )
    with pytest.raises(VLLMValidationError, match="not yet supported"):  # upstream still refuses it
        speculation.refuse_what_drafts_do_not_know(params, SimpleNamespace())


def test_such_a_request_is_given_no_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    def request(params: SamplingParams) -> Any:
        return SimpleNamespace(sampling_params=params, spec_token_ids=[])

    requests = {"plain": request(SamplingParams()), "min_p": request(UNKNOWN[0]), "bias": request(UNKNOWN[1])}

    def give(scheduler: Any, told: Any) -> None:
        for each in requests.values():
            each.spec_token_ids = [1, 2]

    for name, mend, told in (
        ("take_drafts", speculation.take_drafts_that_can_be_checked, SimpleNamespace(req_ids=[*requests, "gone"])),
        (
            "leave_room_for_drafts",
            speculation.leave_room_for_drafts_that_can_be_checked,
            SimpleNamespace(num_scheduled_tokens=requests),
        ),
    ):
        monkeypatch.setattr(speculation, name, give)
        mend(SimpleNamespace(requests=requests), told)
        assert {name: each.spec_token_ids for name, each in requests.items()} == {
            "plain": [1, 2],
            "min_p": [],
            "bias": [],
        }


def test_all_processors_of_logits_are_there_beside_drafts() -> None:
    scheduler = SimpleNamespace(max_num_seqs=4)
    config = SimpleNamespace(speculative_config=SimpleNamespace(), scheduler_config=scheduler)
    arguments = (torch.device("cpu"), False, False)
    kinds = ["LogitBiasLogitsProcessor", "MinPLogitsProcessor", "MinTokensLogitsProcessor"]
    assert sorted(type(each).__name__ for each in speculation.build_all_logitsprocs(config, *arguments).all) == kinds
    left = speculation.build_logitsprocs(config, *arguments).all
    assert [type(each).__name__ for each in left] == kinds[-1:], "upstream still leaves the others out"


def test_no_rows_are_computed_for_drafts_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(self: Any, lookup: list[int] | None, num_spec_tokens: int) -> None:
        self.dynamic_sd_lookup, self.num_spec_tokens, self.max_num_running_reqs = lookup, num_spec_tokens, 3

    monkeypatch.setattr(speculation, "make_scheduler", make)
    for lookup, num_spec_tokens, expected in ((None, 4, [4, 4, 4, 4]), ([0, 2], 4, [0, 2]), (None, 0, None)):
        scheduler = SimpleNamespace()
        speculation.make_scheduler_that_pads_nothing(scheduler, lookup, num_spec_tokens)
        assert scheduler.dynamic_sd_lookup == expected
    source = inspect.getsource(Scheduler.schedule)
    assert "self.num_spec_tokens > 0 and self.dynamic_sd_lookup is None" in source, (
        "upstream pads no more, or otherwise"
    )


@pytest.mark.parametrize(("num_draft_tokens", "sampler"), [([0, 0], "plain"), ([0, 2], "checking")])
def test_without_drafts_the_plain_sampler_draws(num_draft_tokens: list[int], sampler: str) -> None:
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(sampling_metadata=None, update_async_output_token_ids=lambda: None),
        sampler=lambda **_: "plain",
        rejection_sampler=lambda *_: "checking",
        use_async_scheduling=False,
        _get_spec_decode_draft_probs=lambda _: None,
    )
    metadata = SimpleNamespace(num_draft_tokens=num_draft_tokens)
    assert GPUModelRunner._sample(runner, torch.zeros(2, 8), metadata) == sampler
    source = inspect.getsource(GPUModelRunner._prepare_inputs)
    assert "use_spec_decode = self.speculative_config is not None" in source, "upstream may do so itself by now"


class Counter:
    """A counter of Prometheus' that belongs to no registry."""

    made: dict[str, dict[tuple[str, ...], int]]

    def __init__(self, name: str, documentation: str, labelnames: list[str]) -> None:
        self.counts = self.made.setdefault(name, {})
        self.key: tuple[str, ...] = ()

    def labels(self, *values: str) -> Any:
        child = object.__new__(type(self))
        child.counts, child.key = self.counts, values
        return child

    def inc(self, amount: int) -> None:
        self.counts[self.key] = self.counts.get(self.key, 0) + amount


@pytest.mark.parametrize("is_mended", [True, False])
def test_drafted_tokens_are_counted_by_their_position(is_mended: bool) -> None:
    Counter.made = {}
    metrics = SimpleNamespace(_counter_cls=Counter)
    make = speculation.make_counters_by_position if is_mended else speculation.make_counters
    count = speculation.count_by_position if is_mended else speculation.count
    config = SimpleNamespace(num_speculative_tokens=3)
    make(metrics, config, ["engine"], {0: ["0"]})
    stats = SpecDecodingStats.new(3)
    stats.observe_draft(2, 1)
    stats.observe_draft(3, 3)
    count(metrics, stats)
    per_position = Counter.made.get("vllm:spec_decode_num_draft_tokens_per_pos")
    if is_mended:
        assert per_position == {("0", "0"): 2, ("0", "1"): 2, ("0", "2"): 1}
        assert Counter.made["vllm:spec_decode_num_accepted_tokens_per_pos"][("0", "0")] == 2
    else:
        assert per_position is None, "upstream has it by now"


def test_each_draft_token_is_sampled_as_its_stream_is() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    temperatures = torch.tensor([0.7, 1.5, 0.0])
    expand = speculation.expand_batch_to_tokens
    assert expand(temperatures, ends, 5, 0, 1).tolist() == pytest.approx([0.7, 0.7, 1, 1, 1])
    assert expand(torch.tensor([4, 8, 0], dtype=torch.int32), ends, 5).tolist() == [4, 4, 0, 0, 0]
    written = torch.full((5,), -1.0)
    upstreams._expand_kernel_impl(written, temperatures, ends, 0, 1)
    assert written.tolist() == [-1.0] * 5, "upstream's operator writes by now"
