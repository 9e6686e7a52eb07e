"""Code that is compiled beside steps: what computes meanwhile, when it changes over, and what is left when it fails.

`tests/e2e/test_compile_beside.py` has the worker do it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ipex_vllm.low_bit.vllm import compile_beside
from ipex_vllm.low_bit.vllm.compile_beside import CodeToCome, NothingToCompute, WarmUp


class Model:
    """What vLLM's wrapper of a compiled model has, for these functions."""

    _aot_compilation_path = "kept"
    was_aot_compile_fn_loaded_from_disk = False
    aot_compiled_fn: Any = None

    def forward(self, number: int) -> tuple[str, int]:
        return "eager", number


def code(model: Model, number: int) -> tuple[str, int]:
    return "compiled", number


def ended_child(status: int) -> int:
    child = os.fork()
    if child == 0:
        os._exit(status)
    return child


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def until_changed(coming: CodeToCome, model: Model) -> tuple[str, int]:
    deadline = time.monotonic() + 60
    while model.aot_compiled_fn is None and time.monotonic() < deadline:
        found = coming(model, 7)
        time.sleep(0.1)
    return found


def test_steps_are_eager_and_then_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_beside, "load", lambda model, path: code if path == "kept" else None)
    model = Model()
    coming = CodeToCome(model, ended_child(0))
    assert coming(model, 3) == ("eager", 3)
    assert torch.get_num_threads() == 2, "one core is the compiler's"
    assert until_changed(coming, model) == ("compiled", 7)
    assert model.aot_compiled_fn is code, "which vLLM calls itself from then on"
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("status", "kept"), [(1, code), (0, None)])
def test_steps_stay_eager_where_there_is_no_code(status: int, kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(compile_beside, "load", lambda model, path: kept)
    monkeypatch.setattr(compile_beside.logger, "warning", lambda line, *others: told.append(line % others))
    model = Model()
    coming = CodeToCome(model, ended_child(status))
    assert coming(model, 1) == ("eager", 1)
    deadline = time.monotonic() + 60
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)
    assert told == ["steps stay eager, since the model was not compiled; --compile says why before it serves"]
    assert coming(model, 2) == ("eager", 2)
    assert model.aot_compiled_fn(model, 3) == ("eager", 3)
    assert torch.get_num_threads() == 3


# The warm-up, whose batch nobody needs


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A warm-up that has one model loaded and computes a batch; the sizes of what was computed."""
    computed: list[int] = []

    def warm_up(runner: Any) -> None:
        compile_beside.load_in_warm_up(runner.model, "kept")
        computed.append(2048)

    monkeypatch.setattr(compile_beside, "warm_up", warm_up)
    monkeypatch.setattr(compile_beside, "load", lambda model, path: code)
    monkeypatch.setattr(compile_beside.compilation_counter, "num_models_seen", 1)
    yield computed
    assert not WarmUp.is_running


def runner(**changes: Any) -> Any:
    facts = {"kv_cache_memory_bytes": 1 << 28, "world_size_across_dp": 1, "speculative_config": None} | changes
    config = SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_memory_bytes=facts["kv_cache_memory_bytes"]),
        parallel_config=SimpleNamespace(world_size_across_dp=facts["world_size_across_dp"]),
        speculative_config=facts["speculative_config"],
    )
    return SimpleNamespace(vllm_config=config, model=Model(), encoder_cache={"tmp_0": "a picture of the warm-up"})


def test_the_largest_batch_is_not_computed(batches: list[int]) -> None:
    for drafts in (None, SimpleNamespace(method="custom_class")):  # drafts that no model makes
        alone = runner(speculative_config=drafts)
        compile_beside.warm_up_without_a_batch(alone)
        assert batches == []
        assert alone.model.aot_compiled_fn is code
        assert alone.encoder_cache == {}


@pytest.mark.parametrize(
    "other",
    [
        {"kv_cache_memory_bytes": None},  # then vLLM sees by the batch what is left for the cache
        {"world_size_across_dp": 2},  # whose ranks compute it together
        {"speculative_config": SimpleNamespace(method="draft_model")},  # which has code of its own
    ],
)
def test_where_the_batch_is_needed_it_is_computed(other: dict[str, Any], batches: list[int]) -> None:
    compile_beside.warm_up_without_a_batch(runner(**other))
    assert batches == [2048]


def test_outside_of_a_warm_up_code_is_loaded_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_beside, "load", lambda model, path: code)
    model = Model()
    assert compile_beside.load_in_warm_up(model, "kept") is code
    assert model.aot_compiled_fn is None


def test_upstream_computes_the_batch_also_for_code_that_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails once it does not: then `warm_up_without_a_batch` is needed for the fork alone."""
    told: list[str] = []
    runner = SimpleNamespace(
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(mode=3, inductor_compile_config={})),
        profile_run=lambda: told.append("computed"),
    )
    compile_beside.warm_up(runner)
    assert told == ["computed"]


def test_the_end_of_a_warm_up_is_no_error_of_a_model() -> None:
    assert not issubclass(NothingToCompute, (RuntimeError, ValueError, OSError))
