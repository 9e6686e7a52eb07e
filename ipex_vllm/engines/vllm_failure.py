"""Why vLLM did not start, in one line, from whichever of its processes knows.

vLLM's processes log a page of traceback each and tell the process that started them only that something failed. So each
of them runs inside a function of this module, which keeps the first exception of a start in a file and, unless vLLM's
own lines are asked for (`--verbose`), its traceback to itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ipex_vllm.errors import EngineError, OneLine
from ipex_vllm.lifetime import die_with_parent

CAUSE_FILE = "IPEX_VLLM_START_CAUSE"  # the variable that names it, from the start's begin to its end
MAX_LENGTH = 400  # characters of a cause; some list all that there is
REPORTERS = (  # the modules that log why their process fails, in more lines than one
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.registry",
    "vllm.transformers_utils.repo_utils",
)

# What vLLM and the libraries below it say of a checkpoint, and what a user is told. The first that fits counts.
SENTENCES = (
    (
        r"architectures \[(.+?)\] are not supported",
        r"vLLM knows no model of the architecture \1, which config.json names.",
    ),
    (
        r"architectures \[(.+?)\] failed to be inspected",
        r"vLLM's model of the architecture \1 cannot be imported; --verbose shows why.",
    ),
    (
        r"model type `(.+?)` but Transformers does not recognize",
        r"the installed Transformers knows no model_type \1, which config.json names: the model is newer, or was not "
        "written for Transformers.",
    ),
    (
        r"Should have a `model_type` key",
        "config.json names no model_type: the directory holds no Transformers model, or only a part of one.",
    ),
    (
        r"contains custom code which must be executed",
        "the model brings its own code. --trust-remote-code runs it: give that only if you trust who made the model.",
    ),
    (
        r"instantiate the backend tokenizer|Can't load tokenizer|Tokenizer class .* does not exist",
        "the model has no tokenizer that can be read: fetch tokenizer.json and tokenizer_config.json again.",
    ),
    (
        r"Unknown quantization method: (\S+?)\.",
        r"nothing here reads weights that the method \1 has quantized; docs/low-bit.md has the methods that are read.",
    ),
    (
        r"module 'torch' has no attribute '(\w+)'",
        r"config.json names a dtype that PyTorch does not have, \1.",
    ),
    (
        r"validation error for validator '\w+': \w+: (.+?)\.?$",
        r"config.json contradicts itself: \1.",
    ),
    (
        r"no module or parameter named '(.+?)' in (\w+)",
        r"the checkpoint has a tensor, \1, for which vLLM's \2 has no place: it was made for another architecture than "
        "config.json names, or is quantized in a way that config.json does not tell.",
    ),
    (
        r"max seq len \((\d+)\), \((.+?) GiB KV cache is needed, .+ memory \((.+?) GiB\)",
        r"one sequence of \1 tokens needs \2 GiB of KV cache, and \3 GiB are there: shorten --max-model-len, or give "
        "more with --kv-cache-gib.",
    ),
    (
        r"No available memory for the cache blocks",
        "the KV cache holds not one block: give more with --kv-cache-gib.",
    ),
    (
        r"size of tensor a .+ must match the size of tensor b .+?\)|shape .+ is invalid for input|size mismatch",
        r"the checkpoint's tensors have other shapes than config.json or --hf-overrides say (\g<0>).",
    ),
)
ELSE = "--verbose shows where it happened."

_vllms_own: Callable[..., None] | None = None  # what is replaced during a start; a forked process is within one


def check_weights(model: Path) -> None:
    """Raise EngineError where parameters of the model are not in its directory: vLLM leaves them as they come."""
    from ipex_vllm.low_bit.completeness import check_checkpoint

    if not model.is_dir():  # a name, whose files vLLM fetches and holds against their index
        return
    try:
        check_checkpoint(model)
    except ValueError as error:
        raise EngineError(f"--model-path: {error}") from error


@contextlib.contextmanager
def told_in_one_line(model: Path) -> Iterator[None]:
    """Start vLLM on `model` inside of this: what fails in any of its processes is an EngineError that says why."""
    from vllm.v1.engine.core import EngineCoreProc

    global _vllms_own
    _vllms_own = EngineCoreProc.run_engine_core
    with tempfile.TemporaryDirectory(prefix="ipex-vllm-start-") as folder:
        cause = Path(folder) / "cause"
        os.environ[CAUSE_FILE] = str(cause)
        EngineCoreProc.run_engine_core = staticmethod(run_engine_core)
        try:
            with listening():
                yield
        except OneLine:
            raise
        except Exception as error:
            logging.getLogger(__name__).debug("vLLM could not start", exc_info=True)
            told = broken_json(model) or (cause.read_text() if cause.exists() else in_one_line(error))
            raise EngineError(f"vLLM could not start: {told}") from error
        finally:
            EngineCoreProc.run_engine_core = staticmethod(_vllms_own)
            _vllms_own = None
            del os.environ[CAUSE_FILE]


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """What vLLM's engine process runs."""
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.executor.multiproc_executor import WorkerProc

    if _vllms_own is not None:
        die_with_parent()  # as the worker's module says to those that are no forks, which import it
        os.setpgrp()
    WorkerProc.worker_main = staticmethod(worker_main)
    _run(_vllms_own or EngineCoreProc.run_engine_core, *args, **kwargs)


def worker_main(*args: Any, **kwargs: Any) -> None:
    """What each of its worker processes runs."""
    from vllm.v1.executor.multiproc_executor import WorkerProc

    _run(WorkerProc.worker_main, *args, **kwargs)


def _run(target: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    with listening():
        try:
            target(*args, **kwargs)
        except Exception as error:
            if not _is_heard(error):
                raise
            sys.exit(1)  # multiprocessing would print the traceback


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Hear what this process logs about exceptions."""
    listener = _Listener()
    for name in REPORTERS:
        logging.getLogger(name).addFilter(listener)
    try:
        yield
    finally:
        for name in REPORTERS:
            logging.getLogger(name).removeFilter(listener)


class _Listener(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            return not _is_heard(record.exc_info[1])
        return not _is_starting_quietly()


def _is_heard(error: BaseException) -> bool:
    """Keep an exception of a start, if it is the first; True if nobody wants to see its traceback."""
    if CAUSE_FILE in os.environ:
        # Nothing is kept of what fails after the start: the file's folder is gone then.
        with contextlib.suppress(FileExistsError, FileNotFoundError), open(os.environ[CAUSE_FILE], "x") as file:
            file.write(in_one_line(error))
    return _is_starting_quietly()


def _is_starting_quietly() -> bool:
    is_quiet = os.environ.get("VLLM_LOGGING_LEVEL", "INFO") not in ("DEBUG", "INFO")
    return is_quiet and CAUSE_FILE in os.environ and Path(os.environ[CAUSE_FILE]).parent.is_dir()


def in_one_line(error: BaseException) -> str:
    """What an exception says, for a user: without the libraries' decoration, and with what to do."""
    text = " ".join(_message(error).split())
    if killed := re.search(r"Failed core proc\(s\): \{'[^']*': -(\d+)", text):
        reason = "probably for want of memory" if int(killed[1]) == signal.SIGKILL else "in native code"
        return f"its process was killed by signal {killed[1]}, {reason}."
    for pattern, sentence in SENTENCES:
        if match := re.search(pattern, text):
            return match.expand(sentence)
    if type(error) not in (Exception, ValueError, RuntimeError, NotImplementedError, OSError):
        text = f"{type(error).__name__}: {text}"
    if len(text) > MAX_LENGTH:
        text = f"{text[:MAX_LENGTH]} …"
    return f"{text.rstrip('.')}. {ELSE}"


def _message(error: BaseException) -> str:
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    # vLLM checks a field with an exception of its own; pydantic checks some against their types.
    found = ((each["loc"], each["msg"].removeprefix("Value error, ")) for each in error.errors())
    return "; ".join(": ".join((*map(str, where), what)) for where, what in found)


def broken_json(model: Path) -> str | None:
    """Which of a model directory's own files is cut off or otherwise no JSON; None if all are well."""
    for path in sorted(model.glob("*.json")):
        try:
            json.loads(path.read_text())
        except (OSError, ValueError) as error:
            return f"{path} is no JSON ({error}): fetch it again."
    return None
