"""One model over two processes of this machine, as over two sockets of a larger one."""

import os
import sys
from pathlib import Path

import pytest

from tests.processes import Program, Server, worker
from tests.support import free_port, generate

QUESTIONS = ("What does itertools.chain do?", "What is a deque?", "What does os.makedirs do?", "And json.dumps?")
# In float32: in bf16, the order in which the ranks' sums are added decides between nearly equal logits.
MODEL = ("--model-path", "demo", "--low-bit", "fp32", "--no-register")


def greedy(server: Server) -> list[str]:
    prompts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    answers = [generate(server.url, prompt=prompt, temperature=0, max_new_tokens=64, echo=False) for prompt in prompts]
    return [answer["text"] for answer in answers]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    with worker(tmp_path_factory.mktemp("parallel") / "one", *MODEL) as running:
        answers = greedy(running)
    assert all(answers)
    return answers


def test_two_processes_say_what_one_says(tmp_path: Path, alone: list[str]) -> None:
    with worker(tmp_path / "two", *MODEL, "--tensor-parallel-size", "2") as running:
        ranks = [process for process in running.tree() if "VLLM::Worker" in " ".join(process.cmdline())]
        assert len(ranks) == 2
        assert running.listening_at() == {"127.0.0.1"}
        assert greedy(running) == alone
        assert running.stop() == 0


def test_two_hosts_say_what_one_says(tmp_path: Path, alone: list[str]) -> None:
    """Half of the layers each; as far as two workers on one machine can stand for hosts, each with a core."""
    hosts = ("--pipeline-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1")
    shared = (*MODEL, *hosts, "--master-port", str(free_port()), "--kv-cache-gib", "0.25", "--compile")
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    second = (*shared, "--node-rank", "1", "--cores", cores[-1], "--port", str(free_port()))
    with Program(tmp_path / "second", sys.executable, "-m", "ipex_vllm.worker", *second) as follower:
        with worker(tmp_path / "first", *shared, "--cores", cores[0]) as running:
            assert greedy(running) == alone
            for program in (follower, running):
                assert sum("VLLM::Worker" in " ".join(process.cmdline()) for process in program.tree()) == 1
                assert program.listening_at() == {"127.0.0.1"}
            assert running.stop() == 0
        # Where the first one is gone, the second ends as well.
        assert follower.process.wait(60) == 1
        assert "error: host 0, 127.0.0.1, has ended or cannot be reached" in follower.output
