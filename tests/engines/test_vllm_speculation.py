"""--speculative and --draft-model: what vLLM is told, and what is refused in one line before it starts."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.engines.vllm import VllmEngine
from ipex_vllm.engines.vllm_speculation import apply_speculation, check_speculation
from ipex_vllm.errors import OptionError
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan import cpu
from ipex_vllm.plan.speculation import with_speculation

Make = Callable[..., argparse.Namespace]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    VllmEngine.add_arguments(parser)
    return parser


@pytest.fixture
def make(parser: argparse.ArgumentParser) -> Make:
    def make(*flags: str, **chosen: Any) -> argparse.Namespace:
        args = parser.parse_args(flags)
        options = WorkerOptions(model_path=str(MODEL_DIR), kv_cache_gib=1.0, **chosen)
        check_speculation(options, args)
        model = ModelFacts.read(options.model_path)
        if options.draft_model:
            model = model.beside(ModelFacts.read(options.draft_model))
        demands = VllmEngine.demands(args)
        plan = cpu.make_plan(MachineFacts.probe(), options, model, demands)
        apply_speculation(args, with_speculation(plan, options, model, demands))
        return args

    return make


def test_tokens_are_looked_up_by_our_scheduler_and_not_in_vllms_worker(make: Make) -> None:
    for speculative in ("auto", "ngram"):
        args = make(speculative=speculative)
        assert args.speculative_config["method"] == "custom_class"
        module, _, name = args.speculative_config["model"].rpartition(".")
        worker = getattr(importlib.import_module(module), name)(None)
        assert worker.propose([[1], [2]], None, None, slot_mappings=None) == [[], []]
        assert args.per_request_spec_decode_metrics == "summary"
    assert make(speculative="off").speculative_config is None
    assert make().per_request_spec_decode_metrics == "none"


def test_a_model_that_drafts_has_its_weights_in_the_models_format(make: Make) -> None:
    for speculative in ("auto", "draft"):
        args = make(speculative=speculative, draft_model=str(MODEL_DIR), low_bit="sym_int4")
        assert args.speculative_config["method"] == "draft_model"
        assert args.speculative_config["model"] == str(MODEL_DIR)
        assert args.speculative_config["quantization"] == "ipex_sym_int4"
        assert args.async_scheduling is False
    assert make(speculative="draft", draft_model=str(MODEL_DIR)).speculative_config["quantization"] is None


def test_what_the_user_tells_vllm_itself_stays(make: Make) -> None:
    own = '{"method": "ngram", "num_speculative_tokens": 2}'
    assert make("--speculative-config", own).speculative_config == json.loads(own)
    with pytest.raises(OptionError, match="--speculative and vLLM's own --speculative-config: give one of them"):
        make("--speculative-config", own, speculative="ngram")


@pytest.mark.parametrize(
    ("chosen", "flags", "message"),
    [
        ({"speculative": "draft"}, (), "--speculative draft needs --draft-model"),
        ({"draft_model": str(MODEL_DIR)}, (), "--draft-model goes with --speculative draft or auto, not with off"),
        ({"speculative": "ngram"}, ("--runner", "pooling"), "--speculative ngram does not run here: .* writes no text"),
        ({"speculative": "ngram"}, ("--pipeline-parallel-size", "2"), "does not draft over a pipeline"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make: Make, chosen: Any, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        make(*flags, **chosen)
    assert "\n" not in str(caught.value)


def test_auto_is_off_where_drafts_cannot_be_checked(make: Make) -> None:
    assert make("--runner", "pooling", speculative="auto").speculative_config is None


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda config: config | {"vocab_size": 100}, "it has 100 tokens and the model 4096"),
        (
            "tokenizer.json",
            lambda tokenizer: tokenizer | {"model": {"vocab": {"a": 0}}},
            "its tokenizer is another than the model's",
        ),
    ],
)
def test_a_draft_of_another_tokenizer_is_refused_in_one_line(
    make: Make, tmp_path: Path, file: str, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    for name in ("config.json", "tokenizer.json"):
        content = json.loads((MODEL_DIR / name).read_text())
        (tmp_path / name).write_text(json.dumps(change(content) if name == file else content))
    with pytest.raises(OptionError, match=message):
        make(speculative="draft", draft_model=str(tmp_path))
