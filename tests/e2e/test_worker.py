"""A worker as a process: how it starts, refuses to start, drains and dies. On a random model: no answer matters."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from benchmarks.make_model import make_model
from tests.processes import ROOT, eventually, fastchat_controller, listed_models, worker
from tests.support import FakeEngine, free_port, generate, make_server, serving, stream


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model("tiny", tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[str]:
    with fastchat_controller(tmp_path / "controller") as running:
        yield running.url


def fails(*arguments: str, status: int, **environ: str) -> str:
    """Run a worker that cannot start; return what it printed, which holds no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "ipex_vllm.worker", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environ},
    )
    assert done.returncode == status, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    return last


def test_a_model_that_lacks_a_tensor_is_not_served(model: str, tmp_path: Path) -> None:
    incomplete = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(incomplete / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("k_proj.weight"))  # vLLM merges it with others
    del tensors[lost]
    save_file(tensors, incomplete / "model.safetensors", metadata={"format": "pt"})
    assert f"lacks 1 of the model's tensors: {lost}" in fails("--model-path", str(incomplete), status=1)


def test_a_start_is_quiet_and_tells_what_was_chosen(model: str, tmp_path: Path) -> None:
    with worker(tmp_path / "worker", "--model-path", model, "--no-register") as running:
        lines = [line for line in running.output.splitlines() if line.strip()]
        assert len(lines) <= 15, running.output
        for decision in ("machine: ", "cores: ", "preload: ", "KV cache: ", "mode: ", "ready: "):
            assert decision in running.output


def test_sigterm_under_load_loses_nothing(model: str, controller: str, tmp_path: Path) -> None:
    register = ["--model-path", model, "--controller-address", controller]
    with worker(tmp_path / "worker", *register) as running, ThreadPoolExecutor(9) as pool:
        url = running.url
        assert listed_models(controller) == ["tiny"]
        params = {"prompt": "def", "max_new_tokens": 400, "ignore_eos": True}
        answers = [pool.submit(stream, url, **params) for _ in range(8)]
        eventually(lambda: status(url)["queue_length"] == 8, "all running")
        stopping = pool.submit(running.stop)
        eventually(lambda: listed_models(controller) == [], "the controller knows at once")
        assert generate(url, prompt="late")["error_code"] == 42903
        for answer in answers:
            last = answer.result()[-1]
            assert (last["finish_reason"], last["usage"]["completion_tokens"]) == ("length", 400)
        assert stopping.result() == 0


def test_what_the_drain_cuts_off_ends_with_an_error(model: str, tmp_path: Path) -> None:
    arguments = ("--model-path", model, "--no-register", "--drain-timeout", "0.2")
    with worker(tmp_path / "worker", *arguments) as running, ThreadPoolExecutor(4) as pool:
        params = {"prompt": "def", "max_new_tokens": 2000, "ignore_eos": True}
        answers = [pool.submit(stream, running.url, **params), pool.submit(generate, running.url, **params)]
        by_openai = [pool.submit(complete, running.url, stream=stream) for stream in (True, False)]
        eventually(lambda: status(running.url)["queue_length"] == 4, "all running")
        assert running.stop() == 0
        streamed, whole = (answer.result() for answer in answers)
        assert (streamed[-1]["error_code"], whole["error_code"]) == (42903, 42903)
        begun, refused = (answer.result() for answer in by_openai)
        last, done = begun.text.split("\n\n")[-3:-1]
        assert (begun.status_code, done) == (200, "data: [DONE]")
        assert "shut down before the request was finished" in last
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "Traceback" not in running.output
        assert "disconnect" not in running.output


def test_a_dead_engine_ends_the_worker_and_its_requests(model: str, controller: str, tmp_path: Path) -> None:
    register = ["--model-path", model, "--controller-address", controller]
    with worker(tmp_path / "worker", *register) as running, ThreadPoolExecutor(6) as pool:
        url = running.url
        params = {"prompt": "def", "max_new_tokens": 2000, "ignore_eos": True}
        answers = [pool.submit(stream, url, **params) for _ in range(4)]
        by_openai = [pool.submit(complete, url, stream=stream) for stream in (True, False)]
        eventually(lambda: status(url)["queue_length"] == 6, "all running")
        tree = running.tree()
        engine_core(tree).send_signal(signal.SIGKILL)
        for answer in answers:
            assert answer.result()[-1]["error_code"] == 50001
        begun, refused = (answer.result() for answer in by_openai)
        assert "the worker is restarting" in begun.text.split("\n\n")[-3]
        assert refused.status_code == 503
        assert "the worker is restarting" in refused.json()["error"]["message"]
        assert running.process.wait(60) == 1
        assert listed_models(controller) == []
        assert not psutil.wait_procs(tree, timeout=10)[1]


def engine_core(tree: list[psutil.Process]) -> psutil.Process:
    """vLLM's process with the scheduler, by the name that it takes; the kernel cuts names off."""
    return next(child for child in tree if "EngineCor" in child.name() + " ".join(child.cmdline()))


def test_one_rank_computes_in_the_engines_own_process_a_fork_and_a_killed_worker_leaves_none(
    model: str, tmp_path: Path
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    with worker(tmp_path / "worker", "--model-path", model, "--no-register", "--verbose") as running:
        generate(running.url, prompt="def", max_new_tokens=4)
        tree = running.tree()
        assert not [child for child in tree if "Worker" in child.name()], "a process beside the engine's"
        tasks = Path(f"/proc/{engine_core(tree).pid}/task").iterdir()
        alone_on = [*(mask for task in tasks if len(mask := os.sched_getaffinity(int(task.name))) == 1)]
        for core in cores:
            assert {core} in alone_on, "a thread for each core that the plan has, bound to it"
        memory = Path(f"/proc/{engine_core(tree).pid}/smaps_rollup").read_text()
        (shared,) = re.findall(r"^Shared_Dirty: +(\d+) kB", memory, re.MULTILINE)
        assert int(shared) > 100_000, "what the worker has imported is there, and not a second time"
        running.process.kill()
        running.process.wait()
        assert not psutil.wait_procs(tree, timeout=20)[1]


def test_a_second_start_loads_what_the_first_one_compiled(model: str, tmp_path: Path) -> None:
    options = ("--model-path", model, "--low-bit", "sym_int4", "--compile", "--no-register", "--verbose")
    answers = []
    for name in ("first", "second"):
        with worker(tmp_path / name, *options, VLLM_CACHE_ROOT=str(tmp_path / "kept")) as running:
            answers.append(generate(running.url, prompt="def", max_new_tokens=16, temperature=0, ignore_eos=True))
            assert ("Directly load AOT compilation" in running.output) is (name == "second"), running.output
            assert running.stop() == 0
    assert answers[0]["text"] == answers[1]["text"]


def test_two_workers_fit_on_one_machine_with_options_from_everywhere(model: str, tmp_path: Path) -> None:
    config = tmp_path / "worker.yaml"
    config.write_text("model-names: from-file\nmax-model-len: 512\nlimit-worker-concurrency: 7\n")
    arguments = ["--model-path", model, "--config", str(config), "--no-register"]
    environ = {"IPEX_VLLM_MAX_MODEL_LEN": "256"}
    with (
        worker(tmp_path / "first", *arguments, **environ) as first,
        worker(tmp_path / "second", *arguments, "--model-names", "from-flag", **environ) as second,
    ):
        assert status(first.url)["model_names"] == ["from-file"]
        assert status(second.url)["model_names"] == ["from-flag"]
        for url in (first.url, second.url):
            assert httpx.post(f"{url}/model_details", trust_env=False).json() == {"context_length": 256}
            assert generate(url, prompt="def", max_new_tokens=4, ignore_eos=True)["usage"]["completion_tokens"] == 4
        assert "ipex_vllm_slots 7.0" in httpx.get(f"{first.url}/metrics", trust_env=False).text
        assert first.stop(signal.SIGINT) == 0
        assert second.stop() == 0


def test_a_port_in_use_is_told_before_the_model_loads(model: str) -> None:
    with serving(make_server(FakeEngine())) as url:
        port = url.rsplit(":", 1)[1]
        line = fails("--model-path", model, "--port", port, status=2)
    assert port in line
    assert "in use" in line


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    line = fails("--model-path", missing, "--port", str(free_port()), status=1, HF_HUB_OFFLINE="1")
    assert missing in line


def test_an_xpu_that_is_not_there_is_one_line(model: str) -> None:
    assert "XPU" in fails("--model-path", model, "--device", "xpu", "--port", str(free_port()), status=1)


def test_an_unknown_format_is_one_line(model: str) -> None:
    line = fails("--model-path", model, "--load-in-low-bit", "sym_int99", "--port", str(free_port()), status=2)
    assert "sym_int99" in line
    assert "sym_int4" in line


def test_an_eager_pipeline_is_one_line(model: str) -> None:
    arguments = ("--model-path", model, "--pipeline-parallel-size", "2", "--no-compile", "--port", str(free_port()))
    line = fails(*arguments, status=2)
    assert "--pipeline-parallel-size 2" in line
    assert "--no-compile" in line


def test_explain_prints_every_decision_and_loads_nothing(model: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ipex_vllm.worker", "--model-path", model, "--explain", "--api-token", "s3cret"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for decision in ("machine: ", "cores: ", "preload: ", "KV cache: ", "mode: "):
        assert decision in done.stderr
    assert "Loading" not in done.stderr
    assert "s3cret" not in done.stdout + done.stderr


def complete(url: str, **options: object) -> httpx.Response:
    """A long text by OpenAI's API."""
    body = {"model": "tiny", "prompt": "def", "max_tokens": 2000, "ignore_eos": True, **options}
    return httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=120)


def status(url: str) -> dict[str, object]:
    answer: dict[str, object] = httpx.post(f"{url}/worker_get_status", trust_env=False, timeout=60).json()
    return answer


@pytest.fixture(scope="module")
def in_float32(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a worker whose chat template loops when a dialogue begins with "Loop!"."""
    folder = tmp_path_factory.mktemp("in_float32")
    looping = Path(shutil.copytree(model, folder / "tiny"))
    (looping / "chat_template.jinja").write_text(
        "{% if messages[0].content == 'Loop!' %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    with worker(folder / "worker", "--model-path", str(looping), "--no-register", "--low-bit", "fp32") as running:
        yield running.url


def test_sampling_parameters_reach_the_engine(in_float32: str) -> None:
    """On random weights all tokens are nearly as likely, so that every one of these changes the text."""

    def text(**params: object) -> str:
        shared = {"prompt": "def", "echo": False, "max_new_tokens": 40, "ignore_eos": True}
        answer = generate(in_float32, **shared, **params)
        assert answer["error_code"] == 0, answer
        result: str = answer["text"]
        return result

    greedy = text(temperature=0)
    assert text(temperature=0) == greedy
    assert text(temperature=1.5, top_k=1) == greedy
    assert text(temperature=1.5, top_p=0) == greedy
    assert text(temperature=1.5, min_p=1.0) == greedy
    assert text(temperature=1.5, seed=1) == text(temperature=1.5, seed=1) != greedy
    assert text(temperature=1.5, seed=1) != text(temperature=1.5, seed=2)
    assert text(temperature=0, repetition_penalty=2.0) != greedy
    assert text(temperature=0, presence_penalty=2.0, frequency_penalty=2.0) != greedy


def test_a_chat_template_that_loops_on_a_dialogue_costs_that_request_alone(in_float32: str) -> None:
    def chat(content: str) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        return httpx.post(f"{in_float32}/v1/chat/completions", json=body, trust_env=False, timeout=120)

    refused = chat("Loop!")
    assert (refused.status_code, "processor time" in refused.text) == (400, True), refused.text
    assert chat("def").is_success


def test_a_stream_goes_on_while_a_long_prompt_is_computed(model: str, tmp_path: Path) -> None:
    arguments = (
        "--model-path",
        model,
        "--no-register",
        "--max-stream-gap",
        "0.0001",
    )  # so the least that a step may have
    with worker(tmp_path / "worker", *arguments) as running, ThreadPoolExecutor(1) as pool:
        generate(running.url, prompt="import " * 100, max_new_tokens=1)  # the speed is measured
        first = pool.submit(stream, running.url, prompt="def", max_new_tokens=1500, ignore_eos=True)
        eventually(lambda: generated_tokens(running.url) > 10, "running")
        before = generated_tokens(running.url)
        long = generate(running.url, prompt="from " * 1800, max_new_tokens=1)
        assert long["usage"]["prompt_tokens"] >= 1800
        assert generated_tokens(running.url) - before > 1800 / 17, "one for each of the steps that the prompt took"
        assert first.result()[-1]["usage"]["completion_tokens"] == 1500


def generated_tokens(url: str) -> float:
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    (line,) = (line for line in lines if line.startswith("vllm:generation_tokens_total{"))
    return float(line.rsplit(" ", 1)[1])
