"""A model that vLLM cannot serve ends in one line, which says why and what to do, whichever process knows it.

Most are refused before a process is started, so one import of vLLM does for them. One fails in a worker process, in a
real worker, and stands for all that do.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ipex_vllm import worker
from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.engines import vllm_failure
from ipex_vllm.errors import EngineError
from ipex_vllm.machine.facts import MachineFacts

Change = Callable[[Path], object]


def config(**changes: Any) -> Change:
    def change(model: Path) -> None:
        fields = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps({name: value for name, value in fields.items() if value != ""}))

    return change


def without(*names: str) -> Change:
    return lambda model: [(model / name).unlink() for name in names]


def half(name: str) -> Change:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[: (model / name).stat().st_size // 2])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))


@pytest.fixture
def process() -> Iterator[None]:
    """A start changes the process' environment and vLLM's level of logging."""
    before, level = dict(os.environ), logging.getLogger("vllm").level
    yield
    os.environ.clear()
    os.environ.update(before)
    logging.getLogger("vllm").setLevel(level)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (config(architectures=["FooForCausalLM"]), "vLLM knows no model of the architecture 'FooForCausalLM', which"),
        (config(model_type="foo"), "the installed Transformers knows no model_type foo, which config.json names"),
        (config(architectures="", model_type=""), "config.json names no model_type: "),
        (
            config(model_type="foo", auto_map={"AutoConfig": "c.C"}),
            "the model brings its own code. --trust-remote-code",
        ),
        (config(num_attention_heads=7), "config.json contradicts itself: The hidden size (384) is not a multiple of"),
        (config(hidden_size="abc"), "hidden_size"),
        (config(torch_dtype="float99"), "config.json names a dtype that PyTorch does not have, float99."),
        (config(vocab_size=77), "holds tensors of other shapes than the model's: model.embed_tokens.weight"),
        (config(num_hidden_layers=7), "lacks 9 of the model's tensors"),
        (config(quantization_config={"quant_method": "foo"}), "weights that the method foo has quantized;"),
        (without("tokenizer.json", "tokenizer_config.json"), "the model has no tokenizer that can be read: fetch"),
        (half("tokenizer.json"), "tokenizer.json is no JSON (Unterminated string"),
        (half("config.json"), "config.json is no JSON object: fetch it again"),
        (half("model.safetensors"), "model.safetensors is cut off: it has 11018100 of 22036200 bytes"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_one_line(change, told, model, process, monkeypatch, capfd):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # vLLM reads a broken config.json again after two seconds
    change(model)
    with pytest.raises(EngineError) as error:
        start(model)
    assert told in str(error.value)
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)
    written = capfd.readouterr()
    assert "Traceback" not in written.out + written.err
    assert "ERROR" not in written.out + written.err


def start(model: Path) -> None:
    arguments = ("--model-path", str(model), "--kv-cache-gib", "0.1", "--no-compile", "--no-preload")
    engine_class, _, plan = worker.prepare(MachineFacts.probe(), arguments, None)
    asyncio.run(engine_class.start(plan))


def test_what_fails_in_a_process_of_vllms_is_told_by_the_worker(model):
    """The weights are other than the configuration says, which is seen where they are loaded."""
    flags = ("--no-compile", "--no-register", "--kv-cache-gib", "0.1", "--hf-overrides", '{"hidden_size": 96}')
    command = (sys.executable, "-m", "ipex_vllm.worker", "--model-path", str(model), *flags)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: vLLM could not start: the checkpoint's tensors have other shapes than config.json")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "root cause" not in done.stdout + done.stderr


def fail() -> None:
    raise ValueError("the first")


@pytest.mark.parametrize(("level", "ending"), [("ERROR", SystemExit), ("INFO", ValueError)])
def test_a_traceback_is_for_those_who_ask_for_it(level, ending, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", level)
    monkeypatch.setenv(vllm_failure.CAUSE_FILE, str(tmp_path / "cause"))
    with pytest.raises(ending):
        vllm_failure._run(fail)
    assert (tmp_path / "cause").read_text() == "the first. --verbose shows where it happened."


def test_what_fails_after_the_start_is_left_to_vllm(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv(vllm_failure.CAUSE_FILE, str(tmp_path / "gone" / "cause"))
    with pytest.raises(ValueError, match="the first"):
        vllm_failure._run(fail)


@pytest.mark.parametrize(("number", "why"), [(9, "probably for want of memory"), (4, "in native code")])
def test_a_process_that_was_killed_is_told(number, why):
    error = RuntimeError(f"See root cause above. Failed core proc(s): {{'EngineCore': -{number}}}")
    assert vllm_failure.in_one_line(error) == f"its process was killed by signal {number}, {why}."


@pytest.mark.parametrize(
    ("available", "told"),
    [
        (
            1 << 30,
            "one sequence of 4096 tokens needs 2.0 GiB of KV cache, and 1.0 GiB are there: shorten --max-model-len",
        ),
        (0, "the KV cache holds not one block: give more with --kv-cache-gib."),
    ],
)
def test_too_little_kv_cache_is_told_in_the_workers_flags(available, told):
    """What the plan could not know, as of ranks that hold the same; vLLM's own words name flags of others."""
    from vllm.v1.core.kv_cache_utils import _check_enough_kv_cache_memory

    with pytest.raises(ValueError, match="memory") as error:
        _check_enough_kv_cache_memory(available, lambda: 2 << 30, 4096, lambda _: 2048)
    assert vllm_failure.in_one_line(error.value).startswith(told)
