"""What a processor computes in: decided by what its matmuls take. Times in seconds for 1, 16 and 256 rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from ipex_vllm.low_bit import matmul_speed
from ipex_vllm.low_bit.matmul_speed import OWN, MatmulTimes
from ipex_vllm.machine.facts import GIB, MachineFacts
from ipex_vllm.machine.kv_cache import KvCache
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan import cpu, cpu_weights
from ipex_vllm.plan.cpu_weights import choose_weights, request_time
from ipex_vllm.plan.plan import Demands

MODEL = ModelFacts(2 * GIB, 131_072_000, False, KvCache(22_528), 2048)

# Of 2 cores of an Intel Xeon with AMX, and of what oneDNN does there without it: with AVX-512 BF16, and without.
AMX = {"bfloat16": (1.1e-3, 1.1e-3, 4.1e-3), "float16": (1e-3, 2e-3, 17e-3), "float32": (1.8e-3, 2.9e-3, 18e-3)}
BF16 = {"bfloat16": (1.1e-3, 2.4e-3, 28e-3), "float16": (1e-3, 2e-3, 17e-3), "float32": (1.8e-3, 2.9e-3, 19e-3)}
VNNI = {"bfloat16": (1e-3, 9.2e-3, 85e-3), "float16": (1.7e-3, 15e-3, 247e-3), "float32": (1.8e-3, 2.9e-3, 18e-3)}


@pytest.fixture
def measured(monkeypatch, small_box):
    """Chooses for a machine that takes these times: the format, and the line that tells."""

    def choose(times, model=MODEL, memory=16 * GIB, dtype=None, takes_own=True, **options):
        found = None if times is None else MatmulTimes(times)
        monkeypatch.setattr(cpu_weights, "matmul_times", lambda machine, cores: found)
        machine = replace(small_box.probe(), memory_available=memory)
        demands = Demands(dtype=dtype, takes_own_16_bits=takes_own)
        chosen = choose_weights(machine, (0, 1), WorkerOptions(**options), model, demands)
        assert chosen.line.startswith("weights: ")
        assert chosen.own_16_bits == (OWN in chosen.line)
        return chosen.options.low_bit, chosen.line

    return choose


def test_the_faster_of_16_bits_and_float32_is_chosen_and_the_line_has_both_times(measured):
    assert measured(AMX) == (
        None,
        "weights: the checkpoint's own dtype (ms for 1, 16, 256 rows of a 5632x2048 layer: bfloat16 1.1, 1.1, 4.1; "
        "float32 1.8, 2.9, 18)",
    )
    assert measured(VNNI) == (
        "fp32",
        "weights: float32, 1.8 times as fast as bfloat16 (ms for 1, 16, 256 rows of a 5632x2048 layer: bfloat16 1, "
        "9.2, 85; float32 1.8, 2.9, 18; --low-bit bf16 keeps the checkpoint's own, sym_int8 and sym_int4 take less "
        "memory)",
    )


def test_decoding_and_prompts_are_weighed_where_they_disagree(measured):
    """AVX-512 BF16 without AMX: float32 is half as fast again at prompts, and no reason for twice the memory."""
    prompts = BF16["bfloat16"][2] / BF16["float32"][2]
    assert prompts > cpu_weights.LEAST_GAIN
    times = MatmulTimes(BF16)
    # The prompt's 28 ms and 128 tokens of 1.1, or of a sixteenth of 2.4: 168.8 and 47.2 ms.
    assert request_time(times, "bfloat16") == pytest.approx((168.8e-3 * 47.2e-3) ** 0.5)
    assert request_time(times, "bfloat16") < request_time(times, "float32")
    assert measured(BF16)[0] is None
    slow_at_all_rows = {**BF16, "bfloat16": (1.8e-3, 9e-3, 60e-3)}
    assert measured(slow_at_all_rows)[0] == "fp32"


def test_float16_is_left_where_it_is_slow(measured):
    """AMX multiplies bfloat16; without AMX-FP16 a checkpoint in float16 would be computed like float32."""
    in_float16 = replace(MODEL, dtype="float16")
    chosen, line = measured(AMX, in_float16)
    assert chosen == "bf16"
    assert line.startswith("weights: bfloat16, 1.6 times as fast as float16 (")
    assert "--low-bit fp16 keeps the checkpoint's own" in line
    assert measured(AMX, in_float16, memory=5 * GIB)[0] == "bf16", "which takes no more memory"
    assert measured(VNNI, in_float16)[0] == "fp32"
    assert measured({**AMX, "float16": AMX["bfloat16"]}, in_float16)[0] is None


def test_our_kernel_multiplies_16_bits_where_it_is_faster(measured):
    """A CPU with AVX2 alone, which has no instruction for 16 bits: half the memory of float32, and twice its speed."""
    upstream = {"bfloat16": (2e-3, 20e-3, 0.32), "float16": (2e-3, 17e-3, 0.34), "float32": (2.5e-3, 6.7e-3, 62e-3)}
    times = {**upstream, f"bfloat16{OWN}": (1.2e-3, 3e-3, 50e-3), f"float16{OWN}": (1.2e-3, 3e-3, 50e-3)}
    chosen, line = measured(times)
    assert chosen is None
    assert line == (
        "weights: the checkpoint's own dtype (ms for 1, 16, 256 rows of a 5632x2048 layer: bfloat16 2, 20, 3.2e+02; "
        "bfloat16 by our kernel 1.2, 3, 50; float32 2.5, 6.7, 62)"
    )
    assert measured(times, low_bit="bf16") == (
        "bf16",
        "weights: bf16 (chosen with --low-bit), multiplied by our kernel (ms for 1, 16, 256 rows of a 5632x2048 layer: "
        "bfloat16 2, 20, 3.2e+02; bfloat16 by our kernel 1.2, 3, 50)",
    )
    assert measured(times, dtype="float16")[1].startswith(
        "weights: float16 (chosen with --dtype), multiplied by our kernel ("
    )
    assert OWN in measured(times, memory=6 * GIB)[1], "where float32 would not fit, too"
    for elsewhere in (
        measured(times, upstream_kernels=True, low_bit="bf16"),
        measured(times, takes_own=False, low_bit="bf16"),
        measured({**times, **AMX}, low_bit="bf16"),
        measured(times, low_bit="sym_int4", dtype="bfloat16"),
        measured(times, low_bit="fp32"),
        measured(times, replace(MODEL, is_quantized=True, dtype="float32")),
        measured(times, MODEL.share_of(2), low_bit="bf16"),
    ):
        assert OWN not in elsewhere[1]
    assert measured(times, upstream_kernels=True)[0] == "fp32"
    assert measured(times, takes_own=False)[0] == "fp32", "as ipex-llm's engine"


def test_what_a_quantized_checkpoint_leaves_in_16_bits_is_multiplied_by_the_faster_kernel(measured):
    """AWQ's head, in float16, for which a CPU has bfloat16's instructions alone."""
    times = {**BF16, "float16": (0.8e-3, 8.6e-3, 0.14), f"float16{OWN}": (0.9e-3, 2.1e-3, 30e-3)}
    awq = replace(MODEL, is_quantized=True, dtype="float16", quantization="awq")
    ours = "if any, multiplied by our kernel (ms for 1, 16, 256 rows of a 5632x2048 layer:"
    told = f"layers left in float16, {ours} float16 0.8,"
    chosen, line = measured(times, awq)
    assert chosen is None
    assert line.startswith(f"weights: as they are in the checkpoint, which is quantized (awq), {told}")
    line = measured(times, awq, low_bit="asym_int4")[1]
    assert line.startswith(f"weights: asym_int4 (chosen with --low-bit), {told}")
    assert OWN in measured(times, replace(awq, dtype="bfloat16"), dtype="float16")[1], "the dtype that was asked for"
    for options in ({"dtype": "bfloat16"}, {"low_bit": "bf16"}, {"upstream_kernels": True}):
        assert OWN not in measured(times, awq, **options)[1]
    times = {**times, f"bfloat16{OWN}": (0.9e-3, 1e-3, 20e-3)}
    told = f"weights: bf16 (chosen with --low-bit), layers left in bfloat16, {ours} bfloat16 1.1,"
    assert measured(times, awq, low_bit="bf16")[1].startswith(told)


def test_so_is_what_low_bit_leaves_in_16_bits(measured):
    """A vision tower, or the head where it is told to: on a CPU with AVX2 alone."""
    times = {**VNNI, f"bfloat16{OWN}": (1.2e-3, 3e-3, 50e-3)}
    model = replace(MODEL, dtype="bfloat16", tensors={"model.layers.0.mlp.up_proj.weight": ((64, 64), 2)})
    pictures = replace(model, tensors={**model.tensors, "visual.blocks.0.mlp.fc1.weight": ((64, 64), 2)})
    told = "weights: sym_int4 (chosen with --low-bit), layers left in bfloat16, if any, multiplied by our kernel ("
    assert measured(times, pictures, low_bit="sym_int4")[1].startswith(told)
    assert measured(times, model, low_bit="sym_int4", low_bit_head="none")[1].startswith(told)
    assert measured(times, model, low_bit="sym_int4")[1] == "weights: sym_int4 (chosen with --low-bit)"
    assert "left in" not in measured(times, pictures, low_bit="bf16")[1]


def test_what_is_decided_already_is_not_measured(measured):
    def told(*arguments, **options):
        return measured(VNNI, *arguments, **options)[0]

    assert told(low_bit="bf16") == "bf16"
    assert told(low_bit="sym_int4") == "sym_int4"
    assert told(replace(MODEL, is_quantized=True)) is None
    assert told(memory=6 * GIB) is None, "float32 would not fit"
    assert told(replace(MODEL, dtype="float32"), memory=6 * GIB) == "fp32", "of the size that the files have"
    assert told(replace(MODEL, weight_bytes=None)) is None, "its size is not known before it is fetched"
    assert told(MODEL.share_of(2)) is None, "other hosts might measure something else"
    assert measured(None) == (
        None,
        "weights: the checkpoint's own dtype (PyTorch's speed could not be measured)",
    )


def test_the_cores_that_compute_are_measured(dual_xeon, monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_weights, "matmul_times", lambda machine, cores: asked.append(cores))
    cpu.choose(dual_xeon.probe(), WorkerOptions(), MODEL, Demands(num_ranks=2))
    cpu.choose(dual_xeon.probe(), WorkerOptions(), MODEL, Demands(dtype="bfloat16", takes_own_16_bits=True))
    cpu.choose(dual_xeon.probe(), WorkerOptions(), MODEL, Demands(dtype="bfloat16"))
    cpu.choose(dual_xeon.probe(), WorkerOptions(), MODEL, Demands(dtype="float32", takes_own_16_bits=True))
    assert asked == [tuple(range(31))] * 2, "and nothing where there is nothing to choose"


def test_this_machine_is_measured(monkeypatch, tmp_path):
    """In a process with PyTorch, whose threads are on the cores."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = MachineFacts.probe()
    times = matmul_speed.matmul_times(machine, [machine.cpus[0].id])
    assert times is not None
    assert f"bfloat16{OWN}" in times.seconds
    for seconds in times.seconds.values():
        assert 0 < seconds[0] < seconds[2], "256 rows take longer than one"
    assert any(tmp_path.rglob("*")) == times.alone, "and kept where nothing else ran"


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """Makes the process that measures say this, or be missing; nothing is kept yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = tmp_path / "python"
    monkeypatch.setattr(matmul_speed.sys, "executable", str(program))

    def say(times):
        program.unlink(missing_ok=True)
        if times is not None:
            program.write_text(f"#!/bin/sh\necho '{json.dumps(asdict(times))}'\n")
            program.chmod(0o700)

    return say


def test_what_was_measured_is_kept_for_this_machine_as_it_is_set(measuring, monkeypatch, tmp_path):
    machine, cores = MachineFacts.probe(), [0]
    measuring(MatmulTimes(AMX))
    times = matmul_speed.matmul_times(machine, cores)
    measuring(None)
    assert times == matmul_speed.matmul_times(machine, cores) == MatmulTimes(AMX)
    assert matmul_speed.matmul_times(replace(machine, name="another"), cores) is None, "nothing of it is kept"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert matmul_speed.matmul_times(machine, cores) is None
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    (kept,) = (tmp_path / "cache" / "ipex-vllm").iterdir()
    kept.write_text('{"bfloat16": [1, 2]}')
    assert matmul_speed.matmul_times(machine, cores) is None, "half a file is no measurement"


def test_what_was_measured_beside_other_work_decides_one_start_alone(measuring, measured):
    """A start beside two compilers kept 3.1 and 0.97 ms for one row, of 1.2 and 0.86, and so the slower kernel."""
    machine, cores = MachineFacts.probe(), [0]
    measuring(MatmulTimes(BF16, alone=False))
    assert matmul_speed.matmul_times(machine, cores) == MatmulTimes(BF16, alone=False)
    measuring(MatmulTimes(AMX))
    assert matmul_speed.matmul_times(machine, cores) == MatmulTimes(AMX)
    assert measured(VNNI)[1].count("beside other work") == 0
    assert "beside other work" in MatmulTimes(VNNI, alone=False).describe(VNNI)


@pytest.mark.parametrize(
    ("waited", "found"),
    [
        ([0, 0, 0, 1, 1, 1], (0.08, True)),  # the call of 20 ms had waited, the one of 80 had not
        (range(99), (0.02, False)),
    ],
)
def test_calls_that_waited_for_a_core_count_where_there_are_no_others(monkeypatch, waited, found):
    clock, reads, ticks = iter(range(1000)), iter(waited), iter([9, 1, 7, 2, 6, 3, 3, 3, 3])
    monkeypatch.setattr(matmul_speed, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 100))
    monkeypatch.setattr(matmul_speed, "seconds_waited", lambda: next(reads))

    def multiply():
        for _ in range(next(ticks)):
            next(clock)

    seconds, alone = matmul_speed.call_time(multiply, torch.zeros(1))
    assert (pytest.approx(seconds), alone) == found


def test_linux_counts_how_long_this_process_has_waited_for_a_core():
    core = min(os.sched_getaffinity(0))
    with subprocess.Popen(["taskset", "--cpu-list", str(core), sys.executable, "-c", "while True: pass"]) as other:
        try:
            ours = f"import os; os.sched_setaffinity(0, {{{core}}}); from ipex_vllm.low_bit.matmul_speed import *"
            spin = "def spin():\n e = time.perf_counter() + 0.5\n while time.perf_counter() < e: pass"
            code = f"{ours}\n{spin}\nprint(timed(spin)[1], seconds_waited())"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        finally:
            other.kill()
    alone, waited = done.stdout.split()
    assert (alone, float(waited) > 0.1) == ("False", True)
