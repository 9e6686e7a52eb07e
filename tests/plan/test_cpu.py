"""What a worker makes of a machine with a processor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ipex_vllm.errors import EngineError, OptionError
from ipex_vllm.machine.facts import GIB, MachineFacts
from ipex_vllm.machine.kv_cache import KvCache
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan import cpu
from ipex_vllm.plan.plan import Demands, Plan, weight_bytes
from tests.machines import LLAMA_1B, FakeRoot, cores, write_model

MODEL_1B = ModelFacts(2_200_000_000, 131_072_000, False, KvCache(22_528), 2048)
MODEL_8B = ModelFacts(16 * GIB, GIB, False, KvCache(131_072), 8192)
TEN_GIB_CACHE = WorkerOptions(kv_cache_gib=10)  # for tests of other decisions


def make_plan(
    machine: MachineFacts, options: WorkerOptions, model: ModelFacts, num_ranks: int = 1, **demands: int
) -> Plan:
    return cpu.make_plan(machine, options, model, Demands(num_ranks=num_ranks, **demands))


def rank_cores(machine: MachineFacts, num_ranks: int = 1, **options: object) -> tuple[tuple[int, ...], ...]:
    return make_plan(machine, replace(TEN_GIB_CACHE, **options), MODEL_1B, num_ranks).rank_cores


def line(plan: Plan, subject: str) -> str:
    return next(text for text in plan.lines if text.startswith(f"{subject}: "))


# Context


def test_a_context_that_nobody_asked_for_is_shortened_to_what_fits(small_box):
    machine = small_box.probe()
    plan = make_plan(machine, WorkerOptions(), replace(MODEL_1B, max_position=4_000_000))
    assert plan.kv_cache_bytes > 10 * GIB
    assert plan.context == (plan.kv_cache_bytes // (22_528 * 128) - 1) * 128  # vLLM keeps a block
    assert f"1 sequences of {plan.context};" in line(plan, "KV cache")
    assert line(plan, "context") == (
        f"context: {plan.context} of the model's 4000000 tokens (what {plan.kv_cache_bytes / GIB:.2f} GiB of KV cache "
        "hold; more with more free memory, a smaller --low-bit, or a larger --kv-cache-gib)"
    )
    whole = make_plan(machine, WorkerOptions(), MODEL_1B)
    assert whole.context is None
    assert not [text for text in whole.lines if text.startswith("context: ")]


def test_a_context_that_was_asked_for_and_does_not_fit_is_refused(small_box):
    machine, long = small_box.probe(), replace(MODEL_1B, max_position=4_000_000)
    with pytest.raises(EngineError, match=r"^too little memory: .* one sequence of 3000000 tokens needs 62.94 GiB"):
        make_plan(machine, WorkerOptions(), long, max_model_len=3_000_000)
    with pytest.raises(OptionError) as error:
        make_plan(machine, WorkerOptions(kv_cache_gib=0.5), long, max_model_len=50_000)
    assert str(error.value) == (
        "--kv-cache-gib 0.5 is too little: one sequence of 50000 tokens needs 1.05 GiB. Give more, or shorten "
        "--max-model-len."
    )


def test_the_cache_that_was_asked_for_shortens_the_context(small_box):
    plan = make_plan(small_box.probe(), WorkerOptions(kv_cache_gib=0.5), replace(MODEL_1B, max_position=50_000))
    assert plan.context == (GIB // 2 // (22_528 * 128) - 1) * 128
    assert line(plan, "context").startswith(f"context: {plan.context} of the model's 50000 tokens (what 0.50 GiB")


@pytest.mark.parametrize("max_model_len", [0, -2])
def test_a_context_without_a_token_is_refused(small_box, max_model_len):
    with pytest.raises(OptionError, match=f"--max-model-len {max_model_len}: a context has at least one token"):
        make_plan(small_box.probe(), WorkerOptions(), MODEL_1B, max_model_len=max_model_len)


# Cores


def test_a_box_that_hides_its_topology(tmp_path):
    box = FakeRoot(tmp_path, cores(4), shows_topology=False)
    (tmp_path / "proc/self/cgroup").unlink()
    machine = box.probe()
    assert rank_cores(machine) == ((0, 1, 2, 3),)
    assert make_plan(machine, WorkerOptions(), MODEL_1B).kv_cache_bytes > GIB


def test_smt_siblings_stay_idle_and_one_core_serves(dual_xeon):
    plan = make_plan(dual_xeon.probe(), TEN_GIB_CACHE, MODEL_1B)
    assert plan.rank_cores == (tuple(range(31)),)
    assert "64 physical cores on 2 NUMA node(s)" in line(plan, "cores")
    assert "one spared for the server" in line(plan, "cores")
    assert "--tensor-parallel-size 2 would use all" in line(plan, "cores")


def test_ranks_get_a_numa_node_each(dual_xeon):
    assert rank_cores(dual_xeon.probe(), 2) == (tuple(range(31)), tuple(range(32, 63)))


def test_more_ranks_than_nodes_share_the_nodes(dual_xeon):
    ranks = rank_cores(dual_xeon.probe(), 4)
    assert ranks == tuple(tuple(range(first, first + 15)) for first in (0, 16, 32, 48))


def test_two_cores_lose_none(small_box):
    plan = make_plan(small_box.probe(), TEN_GIB_CACHE, MODEL_1B)
    assert plan.rank_cores == ((0, 1),)
    assert "all compute" in line(plan, "cores")
    assert rank_cores(small_box.probe(), 2) == ((0,), (1,))


@pytest.mark.parametrize(("count", "computing"), [(1, 1), (7, 7), (8, 7), (16, 15)])
def test_a_core_is_spared_from_eight_on(tmp_path, count, computing):
    assert len(rank_cores(FakeRoot(tmp_path, cores(count)).probe())[0]) == computing


def test_efficiency_cores_compute_too(hybrid_desktop):
    assert rank_cores(hybrid_desktop.probe()) == ((0, 2, 4, 6, 8, 10, 12, 14, *range(16, 23)),)


def test_more_ranks_than_cores_take_turns(small_box):
    assert rank_cores(small_box.probe(), 3) == ((0,), (1,), (0,))


@pytest.mark.parametrize(
    ("quota", "num_ranks", "computing"), [(4.0, 1, 4), (2.5, 1, 2), (0.5, 1, 1), (64.0, 1, 31), (8.0, 2, 4)]
)
def test_a_cpu_quota_is_not_exceeded(dual_xeon, quota, num_ranks, computing):
    machine = replace(dual_xeon.probe(), quota_cores=quota)
    plan = make_plan(machine, TEN_GIB_CACHE, MODEL_1B, num_ranks)
    assert [len(rank) for rank in plan.rank_cores] == [computing] * num_ranks
    assert (f"the cgroup allows {quota:g} CPUs" in line(plan, "cores")) == (quota < 31)


@pytest.mark.parametrize(
    ("allowed", "computing"),
    [
        ({3}, (3,)),
        ({3, 67}, (3,)),  # two threads of one core
        ({67, 68}, (67, 68)),
        ({0, 40, 41, 42}, (40, 41, 42)),  # most of them on the second node
    ],
)
def test_only_cpus_that_the_process_may_use_compute(dual_xeon, allowed, computing):
    assert rank_cores(dual_xeon.probe(allowed)) == (computing,)


@pytest.mark.parametrize(
    ("chosen", "num_ranks", "expected"),
    [
        ("0-3", 1, ((0, 1, 2, 3),)),
        ("5,3,64-65", 1, ((5, 3, 64, 65),)),
        ("0-3", 2, ((0, 1), (2, 3))),
        ("0-2|32-34", 2, ((0, 1, 2), (32, 33, 34))),
        ("0-1|2-3", 1, ((0, 1, 2, 3),)),
    ],
)
def test_cores_can_be_chosen(dual_xeon, chosen, num_ranks, expected):
    plan = make_plan(dual_xeon.probe(), replace(TEN_GIB_CACHE, cores=chosen), MODEL_1B, num_ranks)
    assert plan.rank_cores == expected
    assert "chosen with --cores" in line(plan, "cores")


@pytest.mark.parametrize("wrong", ["", "a", "0-", "-1", "3-1", "0||1", "0;1"])
def test_a_wrong_list_of_cores_is_one_line(small_box, wrong):
    with pytest.raises(OptionError, match=r"^--cores .*expected a list such as .*$"):
        rank_cores(small_box.probe(), cores=wrong)


def test_a_core_that_is_not_there_is_named(small_box):
    with pytest.raises(OptionError, match=r"^--cores 0-2: this process may not use CPU 2; it has 0,1$"):
        rank_cores(small_box.probe(), cores="0-2")


# KV cache


def kv_cache(machine: MachineFacts, model: ModelFacts = MODEL_8B, num_ranks: int = 1, **options: object) -> int:
    return make_plan(machine, WorkerOptions(**options), model, num_ranks).kv_cache_bytes


def test_the_kv_cache_is_a_share_of_what_is_free(hybrid_desktop):
    plan = make_plan(hybrid_desktop.probe(), WorkerOptions(), MODEL_8B)
    # 50 GiB less 16 of weights and 2 for the processes; of the 32 that are left, 40 %.
    assert plan.kv_cache_bytes == int(0.4 * 32 * GIB)
    assert "12.80 GiB" in line(plan, "KV cache")
    assert "104857 tokens, 13 sequences of 8192" in line(plan, "KV cache")
    assert "32.0 GiB are free after 16.0 GiB of weights" in line(plan, "KV cache")


def test_no_more_kv_cache_than_a_full_batch_can_fill(dual_xeon):
    assert kv_cache(dual_xeon.probe(), MODEL_1B) == 256 * 2048 * 22_528


def test_a_model_in_float32_keeps_its_cache_in_float32(dual_xeon):
    assert kv_cache(dual_xeon.probe(), MODEL_1B, low_bit="fp32") == 256 * 2048 * 22_528 * 2


def test_a_second_worker_fits_on_the_same_box(hybrid_desktop):
    first = kv_cache(hybrid_desktop.probe())
    hybrid_desktop.set_available(50 - 16 - 2 - first / GIB)
    second = kv_cache(hybrid_desktop.probe())
    assert 8192 * 131_072 <= second < first


def test_a_memory_limit_counts_like_memory(hybrid_desktop):
    hybrid_desktop.write("sys/fs/cgroup/memory.max", str(28 * GIB))
    hybrid_desktop.write("sys/fs/cgroup/memory.current", str(0))
    assert kv_cache(hybrid_desktop.probe()) == int(0.4 * 10 * GIB)


def test_a_rank_takes_no_more_than_its_own_node_has(dual_xeon):
    machine = replace(dual_xeon.probe(), node_available={0: 20 * GIB, 1: 30 * GIB})
    assert kv_cache(machine) == 4 * GIB
    # A node that no rank computes on does not count, and one without CPUs neither.
    assert kv_cache(replace(machine, node_available={0: 20 * GIB, 1: 0, 2: 0})) == 4 * GIB
    # Two ranks: twice what the fuller node has, less the weights, for each its half.
    assert kv_cache(machine, num_ranks=2) == (2 * 20 - 16) * GIB // 2


def test_one_sequence_is_tried_whatever_the_node_counts_as_free(small_box):
    machine = replace(small_box.probe(), node_available={0: GIB})
    assert kv_cache(machine, MODEL_1B) == (2048 + 128) * 22_528


def test_too_little_memory_is_one_line_with_the_figures(small_box):
    small_box.set_available(18.5)
    with pytest.raises(EngineError) as error:
        make_plan(small_box.probe(), WorkerOptions(), MODEL_8B, max_model_len=8192)
    assert str(error.value) == (
        "too little memory: 18.5 GiB free, 16.0 GiB weights, 2.0 GiB for the processes, and one sequence of 8192 "
        "tokens needs 1.00 GiB of KV cache. Free memory, shorten --max-model-len, or set --kv-cache-gib."
    )


def test_what_the_line_advises_helps(small_box):
    small_box.set_available(18.5)
    machine = small_box.probe()
    assert make_plan(machine, WorkerOptions(), MODEL_8B, max_model_len=2048).kv_cache_bytes >= 2048 * 131_072
    assert kv_cache(machine, kv_cache_gib=1.0) == GIB
    small_box.set_available(19.1)
    assert kv_cache(small_box.probe()) == (8192 + 128) * 131_072


def test_low_bit_weights_leave_more_for_the_cache(small_box):
    small_box.set_available(18)
    machine = small_box.probe()
    # The embedding's GiB stays as it is; the other 15 take 4.5 bits a weight instead of 16.
    int4_weights = GIB + 15 * GIB * 4.5 / 16
    assert kv_cache(machine, low_bit="sym_int4") == pytest.approx(0.4 * (16 * GIB - int4_weights), abs=1)
    assert kv_cache(machine, low_bit="sym_int8") < kv_cache(machine, low_bit="sym_int4")
    for weights in ("bf16", "fp16", "fp32"):
        with pytest.raises(EngineError, match="too little memory"):
            kv_cache(machine, low_bit=weights)
    with pytest.raises(EngineError, match="too little memory"):
        kv_cache(machine, replace(MODEL_8B, is_quantized=True), low_bit="sym_int4")


def test_an_unknown_low_bit_format_is_one_line(small_box):
    with pytest.raises(OptionError, match=r"^--low-bit: .*'int3'.*sym_int4.*$"):
        kv_cache(small_box.probe(), low_bit="int3")


def test_a_model_of_unknown_size_gets_a_modest_cache(small_box, dual_xeon):
    plan = make_plan(dual_xeon.probe(), WorkerOptions(), ModelFacts())
    assert plan.kv_cache_bytes == 4 * GIB
    assert "not known yet" in line(plan, "KV cache")
    assert kv_cache(dual_xeon.probe(), ModelFacts(), num_ranks=2) == 2 * GIB
    assert kv_cache(replace(small_box.probe(), memory_available=5 * GIB), ModelFacts()) == GIB


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_wrong_kv_cache_size_is_one_line(small_box, wrong):
    with pytest.raises(OptionError, match=r"^--kv-cache-gib must be above 0$"):
        kv_cache(small_box.probe(), kv_cache_gib=wrong)


# Compile or eager


def test_a_small_model_runs_eagerly_and_a_large_one_compiled(small_box):
    machine = small_box.probe()
    tiny = replace(MODEL_1B, weight_bytes=10 << 20)
    eager = make_plan(machine, WorkerOptions(), tiny)
    compiled = make_plan(machine, WorkerOptions(), MODEL_1B)
    assert (eager.use_compile, compiled.use_compile) == (False, True)
    assert "eager (10 MiB of weights" in line(eager, "mode")
    assert "torch.compile (" in line(compiled, "mode")
    assert make_plan(machine, WorkerOptions(), replace(MODEL_1B, weight_bytes=94 << 20)).use_compile  # SmolLM2's file
    for chosen, name in ((True, "--compile"), (False, "--no-compile")):
        for model in (tiny, MODEL_1B):
            plan = make_plan(machine, WorkerOptions(compile=chosen), model)
            assert plan.use_compile is chosen
            assert line(plan, "mode").endswith(f"(chosen with {name})")


def test_a_pipeline_is_compiled_whatever_the_models_size(small_box):
    tiny = replace(MODEL_1B, weight_bytes=10 << 20)
    plan = make_plan(small_box.probe(), WorkerOptions(), tiny, num_ranks=2, num_stages=2)
    assert plan.use_compile
    assert "torch.compile (vLLM's pipeline" in line(plan, "mode")


# Every decision is told


@pytest.mark.parametrize("options", [WorkerOptions(), WorkerOptions(preload=False, compile=True, kv_cache_gib=1.0)])
@pytest.mark.parametrize("machine", ["small_box", "dual_xeon", "hybrid_desktop"])
def test_every_decision_is_one_line_with_its_reason(request, machine, options):
    plan = make_plan(request.getfixturevalue(machine).probe(), options, MODEL_1B)
    facts, *decisions = plan.lines
    assert facts.startswith("machine: ")
    assert [text.partition(":")[0] for text in decisions] == ["cores", "preload", "KV cache", "mode"]
    for text in decisions:
        _, opened, reason = text.removesuffix(")").partition(" (")
        assert opened
        assert reason
        assert "\n" not in text


def test_the_machine_is_told(dual_xeon):
    plan = make_plan(dual_xeon.probe(), WorkerOptions(), MODEL_1B)
    assert plan.lines[0].startswith("machine: Intel(R) Xeon(R) Platinum 8462Y+; avx2, avx512f")
    assert plan.lines[0].endswith("; 490.0 of 512.0 GiB free")


def test_what_is_preloaded_is_told(small_box, monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    nothing = line(make_plan(small_box.probe(), WorkerOptions(), MODEL_1B), "preload")
    assert nothing.startswith("preload: nothing (not installed: libiomp5.so (pip install intel-openmp), tcmalloc")
    small_box.install("libiomp5.so", "libtcmalloc_minimal.so.4")
    off = line(make_plan(small_box.probe(), WorkerOptions(preload=False), MODEL_1B), "preload")
    assert off == "preload: nothing (switched off with --no-preload)"
    monkeypatch.setenv("LD_PRELOAD", "/opt/libjemalloc.so.2:/venv/lib/libiomp5.so")
    asked = line(make_plan(small_box.probe(), WorkerOptions(), MODEL_1B), "preload")
    assert asked == "preload: nothing (in LD_PRELOAD, but not loaded: libjemalloc.so.2, libiomp5.so)"
    small_box.load("/opt/libjemalloc.so.2", "/a b/libiomp5.so")
    both = line(make_plan(small_box.probe(), WorkerOptions(), MODEL_1B), "preload")
    assert both.startswith("preload: libjemalloc.so.2, libiomp5.so (threads")


def test_a_library_whose_path_has_a_space_is_preloaded(tmp_path):
    library = tmp_path / "an environment" / "libiomp5.so"
    library.parent.mkdir()
    shutil.copy(Path(sys.prefix) / "lib" / "libiomp5.so", library)
    code = (
        "import sys; from dataclasses import replace; from ipex_vllm.plan import cpu\n"
        "from ipex_vllm.machine.facts import MachineFacts\n"
        "machine = replace(MachineFacts.probe(), iomp=sys.argv[1], tcmalloc=None)\n"
        "cpu.apply(machine)\n"
        "print(*(path for path in machine.loaded if 'iomp' in path), machine.has_loaded('libiomp5.so'))\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, "-c", code, library], env=environ, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == (f"{library} True\n", "")


# Preloading


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], str]]:
    """The program, arguments and LD_PRELOAD of each execution that was asked for."""
    calls: list[tuple[str, list[str], str]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: calls.append((path, argv, os.environ["LD_PRELOAD"])))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "-m", "ipex_vllm.worker", "--port", "1"])
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # the user's, which stays
    return calls


def test_the_process_starts_again_once_with_the_same_arguments(small_box, executed):
    small_box.install("libiomp5.so", "libtcmalloc_minimal.so.4")
    machine = small_box.probe()
    cpu.apply(machine)
    arguments = [sys.executable, "-X", "utf8", "-m", "ipex_vllm.worker", "--port", "1"]
    assert executed == [(sys.executable, arguments, f"{machine.tcmalloc}:{machine.iomp}")]
    cpu.apply(machine)  # what the new process does
    assert len(executed) == 1


@pytest.mark.skipif(
    "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(), reason="this kernel has no huge pages"
)
def test_large_tensors_are_in_huge_pages():
    code = (
        "import sys; sys.orig_argv[1:] = ['-c', sys.argv[1], sys.argv[1]]\n"
        "from ipex_vllm.machine.facts import MachineFacts\n"
        "from ipex_vllm.plan import cpu\n"
        "cpu.apply(MachineFacts.probe())\n"
        "import torch\n"
        "weights = torch.ones(64 << 20, dtype=torch.uint8)\n"
        "rollup = open('/proc/self/smaps_rollup').read().split()\n"
        "print(int(rollup[rollup.index('AnonHugePages:') + 1]) << 10)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, code], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) >= 32 << 20


def test_nothing_to_preload_is_no_new_start(small_box, executed):
    cpu.apply(small_box.probe())
    assert executed == []


@pytest.mark.parametrize(
    ("theirs", "added"),
    [
        ("/opt/libhook.so", ["libtcmalloc_minimal.so.4", "libiomp5.so"]),
        ("/opt/libjemalloc.so.2", ["libiomp5.so"]),
        ("/opt/libtcmalloc.so.4", ["libiomp5.so"]),
        ("/usr/lib/libgomp.so.1", ["libtcmalloc_minimal.so.4"]),
        ("/opt/libomp.so", ["libtcmalloc_minimal.so.4"]),
        ("/opt/libiomp5.so /opt/libmimalloc.so", []),
    ],
)
def test_the_users_own_preload_stays_and_is_not_doubled(small_box, executed, monkeypatch, theirs, added):
    small_box.install("libiomp5.so", "libtcmalloc_minimal.so.4")
    monkeypatch.setenv("LD_PRELOAD", theirs)
    cpu.apply(small_box.probe())
    if not added:
        assert executed == []
        return
    [(_, _, preloaded)] = executed
    *ours, last = preloaded.split(":")
    assert [Path(path).name for path in ours] == added
    assert last == theirs


def test_all_this_comes_before_anything_heavy():
    code = "import sys, ipex_vllm.plan.cpu; print(*sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert loaded.stdout.strip() == ""


# Weights


def test_experts_are_counted_as_what_they_are(tmp_path):
    """A mixture of experts: they are quantized where a kernel takes them so, and else stay; the plan knows."""
    shapes = {
        "model.embed_tokens.weight": (1000, 256),
        "model.layers.0.self_attn.q_proj.weight": (256, 256),
        "model.layers.0.mlp.experts.0.up_proj.weight": (512, 256),
        "model.layers.0.mlp.experts.1.up_proj.weight": (512, 256),
        "lm_head.weight": (1000, 256),
    }
    entries, end = {}, 0
    for name, (outputs, inputs) in shapes.items():
        start, end = end, end + 2 * outputs * inputs
        entries[name] = {"dtype": "BF16", "shape": [outputs, inputs], "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))
    model = ModelFacts.read(write_model(tmp_path, LLAMA_1B))
    assert model.tensors["lm_head.weight"] == ((1000, 256), 2)
    kept, experts = 2 * 256 * 1000, 256 * 2 * 512
    # 4 bits and a scale of 16 for 32; the head in 8 bits, with a scale of 32 for 64.
    quantized = (256 * 256 + experts) * 4.5 / 8 + 1000 * 256 * (1 + 4 / 64)
    assert weight_bytes(model, WorkerOptions(low_bit="sym_int4")) == kept + quantized
    assert weight_bytes(model, WorkerOptions(low_bit="sym_int4"), num_ranks=2) == kept + quantized
    assert weight_bytes(model.share_of(2), WorkerOptions(low_bit="sym_int4")) == (kept + quantized) // 2
    in_odd_parts = kept + quantized + experts * (2 - 4.5 / 8)  # of 16 rows, so experts stay as they are
    assert weight_bytes(model, WorkerOptions(low_bit="sym_int4"), num_ranks=16) == in_odd_parts
    kept_experts = weight_bytes(model, WorkerOptions(low_bit="fp6")) - weight_bytes(
        model, WorkerOptions(low_bit="sym_int4")
    )
    assert kept_experts >= experts * (2 - 1)
    assert weight_bytes(model, WorkerOptions(low_bit="fp32")) == 2 * end


def test_each_of_several_hosts_needs_memory_for_its_share_alone(small_box):
    """A model that fits no host alone."""
    machine = replace(small_box.probe(), memory_available=8 * GIB)
    model = replace(MODEL_8B, weight_bytes=10 * GIB)
    with pytest.raises(EngineError, match="too little memory"):
        make_plan(machine, WorkerOptions(), model)
    assert make_plan(machine, WorkerOptions(), model.share_of(2)).kv_cache_bytes > 0
    assert ModelFacts().share_of(2) == ModelFacts()


def test_gated_linear_attention_is_computed_in_bf16_also_where_float32_would_be_faster(small_box):
    machine, model = small_box.probe(), replace(MODEL_1B, is_gated_linear=True)
    plan = cpu.choose(machine, WorkerOptions(), model, Demands())
    assert plan.low_bit == "bf16"
    assert line(plan, "weights") == "weights: bf16 (in which alone vLLM computes gated linear attention on a CPU)"
    assert cpu.choose(machine, WorkerOptions(low_bit="sym_int4"), model, Demands()).low_bit == "sym_int4"
    assert cpu.choose(machine, WorkerOptions(), replace(model, is_quantized=True), Demands()).low_bit is None
    for options, demands in ((WorkerOptions(low_bit="fp32"), Demands()), (WorkerOptions(), Demands(dtype="float32"))):
        with pytest.raises(OptionError, match="in bf16 alone; leave it out"):
            cpu.choose(machine, options, model, demands)


@pytest.mark.parametrize("model_type", cpu.MAMBA_1)
def test_a_model_whose_operator_does_not_exist_is_told_before_anything_loads(small_box, model_type):
    with pytest.raises(EngineError, match=r"for GPUs alone\. Models of Mamba 2 run"):
        cpu.choose(small_box.probe(), WorkerOptions(), replace(MODEL_1B, model_type=model_type), Demands())
