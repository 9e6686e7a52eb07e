"""One model over two processes of this machine, as over two sockets of a larger one."""

from pathlib import Path

import pytest

from tests.processes import Server, worker
from tests.support import generate

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


@pytest.mark.parametrize("parallel", [("--tensor-parallel-size", "2"), ("--pipeline-parallel-size", "2", "--compile")])
def test_two_processes_say_what_one_says(tmp_path: Path, alone: list[str], parallel: tuple[str, ...]) -> None:
    with worker(tmp_path / "two", *MODEL, *parallel) as running:
        ranks = [process for process in running.tree() if "VLLM::Worker" in " ".join(process.cmdline())]
        assert len(ranks) == 2
        assert greedy(running) == alone
        assert running.stop() == 0
