"""The commands, from end to end, on fake servers in processes of their own."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from benchmarks.compare import systems
from benchmarks.compare.__main__ import Comparison
from benchmarks.compare.findings import Findings
from benchmarks.compare.running import RunningSystem
from benchmarks.compare.spec import Spec
from benchmarks.compare.systems import launch
from benchmarks.options import BenchmarkError
from ipex_vllm.demo import MODEL_DIR
from tests.support import free_port

ROOT = Path(__file__).parents[2]
FAKE = f"{sys.executable} -m tests.benchmarks.fake_server"


def bench(*arguments: object, wait: bool = True) -> Any:
    command = [sys.executable, "-m", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.run(command, **pipes) if wait else subprocess.Popen(command, **pipes)  # type: ignore[call-overload]


def running_fake(model: Path, tmp_path: Path, token_s: float = 0.0) -> RunningSystem:
    flags = ["fastchat", *FAKE.split(), "{port}", str(token_s)]
    return RunningSystem(
        launch("command", model, free_port(), flags), tmp_path / "fake.log", {}, os.sched_getaffinity(0)
    )


def write_spec(path: Path, model: Path, systems: dict[str, str], **changes: Any) -> Path:
    """A spec of fake systems, each given by the protocol and the seconds per token."""
    entries = {
        name: {"system": "command", "format": "bf16", "flags": f"{kind.split()[0]} {FAKE} {{port}} {kind.split()[1]}"}
        for name, kind in systems.items()
    }
    spec = {
        "title": "Fakes",
        "model": str(model),
        "baseline": next(iter(systems)),
        "systems": entries,
        "load": {"prompt": 8, "output": 4},
        "workloads": {"c2": {"arrivals": "closed:2", "requests": 4}},
        "rounds": 3,
        "roofline": False,
        "port": free_port(),
    }
    path.write_text(yaml.safe_dump(spec | changes))
    return path


def wait_until(is_true: Callable[[], object]) -> None:
    while not is_true():
        time.sleep(0.05)


@pytest.mark.parametrize("resident", [True, False])
def test_compare(model: Path, tmp_path: Path, resident: bool) -> None:
    systems = {"quick": "fastchat 0.002", "slow": "openai 0.02", "broken": "openai nonsense"}
    workloads = {f"c{users}": {"arrivals": f"closed:{users}", "requests": 2 * users} for users in (1, 2)}
    spec = write_spec(tmp_path / "spec.yaml", model, systems, resident=resident, workloads=workloads)
    done = bench("benchmarks.compare", spec, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    figures = result["workloads"]["c2"]["systems"]
    assert list(figures) == ["quick", "slow"]
    assert len(figures["slow"]["metrics"]["output_tps"]["values"]) == 3
    assert figures["slow"]["metrics"]["output_tps"]["ratio_to_baseline"]["pairs"] == 3
    assert figures["slow"]["greedy_agreement_with_baseline"] == 1.0
    assert result["workloads"]["c2"]["noise_floor"]["output_tps"] > 0
    assert "the server ended with status 1" in result["failed"]["broken"]
    assert "ValueError" in result["failed"]["broken"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"result.json", "summary.md", "requests-slow-c2.csv", "ratios-c2.png", "throughput.svg"} <= written
    assert "throughput-by-streams.svg" in written

    page = bench("benchmarks.report", tmp_path / "out")
    assert page.returncode == 0, page.stderr
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("<svg") == 4
    assert "<td>slow</td>" in html
    assert "http-equiv" not in html
    assert "src=" not in html


@pytest.mark.parametrize(
    ("widest", "num_rounds", "deadline", "is_over"),
    [(0.2, 1, math.inf, False), (0.2, 2, math.inf, False), (0.2, 2, 0.0, True), (0.01, 2, math.inf, True)],
)
def test_rounds_go_on_until_the_intervals_are_narrow_or_time_is_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    widest: float, num_rounds: int, deadline: float, is_over: bool,
) -> None:  # fmt: skip
    wishes = {"rounds": 2, "noise_rounds": 3, "precision": 0.05}
    spec = Spec.read(write_spec(tmp_path / "spec.yaml", model, {"quick": "fastchat 0", "slow": "fastchat 1"}, **wishes))
    comparison = Comparison(spec, tmp_path, set())
    monkeypatch.setattr(Findings, "widest", lambda self, names: widest)
    assert comparison._is_over("main", ["quick", "slow"], num_rounds, deadline) == is_over
    assert [comparison._is_over("noise", ["quick"], count, deadline) for count in (2, 3)] == [False, True]


def test_an_absent_system_is_said_and_left_out(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_SERVER", "/nowhere/llama-server")
    spec = write_spec(tmp_path / "spec.yaml", model, {"quick": "fastchat 0"}, rounds=2)
    content = yaml.safe_load(spec.read_text())
    content["systems"]["absent"] = {"system": "llama_cpp", "format": "q4_0"}
    spec.write_text(yaml.safe_dump(content))
    done = bench("benchmarks.compare", spec)
    assert done.returncode == 0, done.stderr
    assert "absent: not installed: run `make env-llama-cpp`" in done.stdout


def test_an_interrupted_comparison_writes_what_it_has(model: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path / "spec.yaml", model, {"quick": "fastchat 0.002", "slow": "fastchat 0.01"}, rounds=500)
    process = bench("benchmarks.compare", spec, "--out", tmp_path / "out", wait=False)
    wait_until((tmp_path / "out" / "baseline-again.log").exists)
    time.sleep(1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert json.loads(stdout.splitlines()[-1])["partial"] is True
    assert "partial" in (tmp_path / "out" / "summary.md").read_text()
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_serve(model: Path, tmp_path: Path) -> None:
    with running_fake(model, tmp_path, 0.001) as fake:
        done = bench(
            "benchmarks.serve", "--url", fake.launch.url, "--model-path", model, "--prompt", 8, "--output", 4,
            "--arrivals", "poisson:100", "--requests", 6, "--warmup", 2, "--cooldown", 2, "--slo", "ttft:5",
            "--out", tmp_path / "out",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "10 ok, 0 failed, 0 incomplete" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["summary"]["requests"]["measured"] == 6
    assert result["resources"]["server"]["rss_peak_bytes"] > 0
    with (tmp_path / "out" / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["warmup"] * 2 + ["measured"] * 6 + ["cooldown"] * 2
    assert {row["output_tokens"] for row in rows} == {"4"}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "result.json", "requests.csv", "summary.md", "latency.png", "latency.svg", "timeline.png", "timeline.svg",
    }  # fmt: skip


def test_an_interrupted_run_writes_what_it_has(model: Path, tmp_path: Path) -> None:
    with running_fake(model, tmp_path, 0.01) as fake:
        process = bench(
            "benchmarks.serve", "--url", fake.launch.url, "--model-path", model, "--prompt", 8, "--output", 4,
            "--requests", 2000, "--out", tmp_path / "out", wait=False,
        )  # fmt: skip
        wait_until(psutil.Process(process.pid).net_connections)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    result = json.loads(stdout.splitlines()[-1])
    assert result["partial"] is True
    assert result["summary"]["requests"]["ok"] > 0
    assert (tmp_path / "out" / "requests.csv").exists()


def test_sweep(model: Path, tmp_path: Path) -> None:
    with running_fake(model, tmp_path, 0.005) as fake:
        done = bench(
            "benchmarks.sweep", "--url", fake.launch.url, "--model-path", model, "--prompt", 8, "--output", 4,
            "--requests", 6, "--max-levels", 3, "--out", tmp_path / "out",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [level["level"] for level in result["levels"]] == [1, 2, 4]
    assert result["saturated"] is False
    assert result["knee"] in (1, 2, 4)
    assert (tmp_path / "out" / "sweep.png").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["benchmarks.serve", "--url", "http://127.0.0.1:9", "--model-path", "MODEL"], "no fastchat server answers"),
        (["benchmarks.serve", "--url", "http://127.0.0.1:9", "--model-path", "."], "tokenizer.json not found"),
        (["benchmarks.serve"], "required: --url, --model-path"),
        (["benchmarks.sweep", "--url", "u", "--model-path", "MODEL", "--start", "0.5"], "whole number of users"),
        (["benchmarks.compare", "/no/such.yaml"], "No such file"),
        (["benchmarks.report", "/no/such"], "holds no result"),
    ],
)
def test_mistakes_are_one_line(model: Path, arguments: list[str], complaint: str) -> None:
    done = bench(*(str(model) if argument == "MODEL" else argument for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_paused_system_uses_no_cpu_and_goes_on_afterwards(model: Path, tmp_path: Path) -> None:
    with running_fake(model, tmp_path) as fake:
        (pid,) = fake.pids
        fake.pause()
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        with fake.resumed():
            wait_until(lambda: psutil.Process(pid).status() != psutil.STATUS_STOPPED)
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    assert not psutil.pid_exists(pid)


def test_a_server_that_dies_at_start_says_why(model: Path, tmp_path: Path) -> None:
    system = launch("command", model, free_port(), ["openai", "sh", "-c", "echo no such weights; exit 3"])
    with (
        pytest.raises(BenchmarkError, match=r"ended with status 3; .*ends: no such weights"),
        RunningSystem(system, tmp_path / "log", {}, os.sched_getaffinity(0)),
    ):
        pass


def test_zentorch_is_found_by_its_own_server_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zentorch = systems.ZENTORCH
    monkeypatch.setattr(systems, "ZENTORCH", tmp_path / "absent")
    with pytest.raises(systems.Absent, match="make env-zentorch"):
        launch("vllm_serve_zentorch", model, 1, [])
    monkeypatch.setattr(systems, "ZENTORCH", tmp_path)
    plain, with_it = (launch(name, model, 1, []).commands[0] for name in ("vllm_serve", "vllm_serve_zentorch"))
    assert with_it.argv == plain.argv
    assert plain.env == {"VLLM_PLUGINS": ""}
    assert with_it.env == {"VLLM_PLUGINS": "", "PYTHONPATH": str(zentorch)}


def test_the_parts_of_a_step_add_up_to_what_a_client_sees() -> None:
    flags = "--no-compile --kv-cache-gib 0.125 --max-model-len 256"
    done = bench("benchmarks.steps", "--model-path", MODEL_DIR, "--worker", flags, "--output", 32, "--streams", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    (parts,) = json.loads(done.stdout.splitlines()[-1])["rows"].values()
    gap = parts.pop("gap")
    assert sum(parts.values()) == pytest.approx(gap)
    assert all(parts[name] > 0 for name in ("scheduler", "inputs", "matmuls", "attention", "sampler"))
