"""A worker that serves while its model is compiled, with the compiler that users have and a real model."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.processes import Server
from tests.support import generate

COMPILING, COMPILED = "compiling beside the service", "compiled beside the service in"
KEPT = "Directly load AOT compilation"


def smollm2(folder: Path, kept: Path) -> Server:
    flags = ("--model-path", "smollm2", "--kv-cache-gib", "0.25", "--no-register", "--verbose")
    return Server(folder, "/ready", "ipex_vllm.worker", *flags, VLLM_CACHE_ROOT=str(kept))


def compiler(running: Server) -> psutil.Process:
    (found,) = [process for process in running.tree() if "Compiler" in " ".join(process.cmdline())]
    return found


def test_a_stream_goes_on_over_the_change_and_the_next_start_has_the_code(tmp_path: Path) -> None:
    greedy = {"prompt": "The history of", "temperature": 0, "ignore_eos": True}
    with smollm2(tmp_path / "first", tmp_path / "kept") as running:
        assert COMPILING in running.output
        if len(os.sched_getaffinity(0)) > 1:
            assert len(compiler(running).cpu_affinity() or []) < len(os.sched_getaffinity(0)), "a core is for steps"
        while COMPILED not in running.output:
            usage = generate(running.url, **greedy, max_new_tokens=200)["usage"]
            assert usage["completion_tokens"] == 200, "no token is lost"
        after = generate(running.url, **greedy, max_new_tokens=32)["text"]
        assert "Compiler" not in " ".join(" ".join(process.cmdline()) for process in running.tree())
        assert running.stop() == 0
    with smollm2(tmp_path / "second", tmp_path / "kept") as running:
        assert KEPT in running.output
        assert COMPILING not in running.output
        assert generate(running.url, **greedy, max_new_tokens=32)["text"] == after
        assert running.stop() == 0


@pytest.mark.parametrize("end", [lambda running: running.stop(), lambda running: running.process.kill()])
def test_the_compiler_ends_with_the_worker(end: Callable[[Server], object], tmp_path: Path) -> None:
    with smollm2(tmp_path / "worker", tmp_path / "kept") as running:
        tree = running.tree()
        assert compiler(running) in tree
        end(running)
        assert not psutil.wait_procs(tree, timeout=20)[1]


def test_a_compiler_that_dies_leaves_the_service(tmp_path: Path) -> None:
    with smollm2(tmp_path / "worker", tmp_path / "kept") as running:
        compiler(running).send_signal(signal.SIGKILL)
        running.wait_for_output("steps stay eager")
        assert generate(running.url, prompt="def", max_new_tokens=8, ignore_eos=True)["usage"]["completion_tokens"] == 8
        assert running.stop() == 0
