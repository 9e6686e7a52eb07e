from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.load.arrivals import ClosedLoop
from benchmarks.load.generate import LoadOptions, make_work
from benchmarks.load.measure import bound_of
from benchmarks.load.workload import PromptWriter
from benchmarks.micro.bound import WEIGHTS, ModelShape, Peaks, Weights, bound_tps, work_bound_tps
from benchmarks.options import BenchmarkError

# 100 weights in the body, 20 in the head, KV cache of 2*1*3*2 = 12 bytes a token, attention 4*1*5 = 20 operations.
SHAPE = ModelShape(body_weights=100, head_weights=20, num_layers=1, attention_width=5, kv_width=3)
BYTES = Weights(bits=8, head_bits=16, compute="int8")  # 140 bytes of weights


def peaks(read: float, ops: float) -> Peaks:
    return Peaks(read_bytes_per_s=read, fp32_ops_per_s=ops, bf16_ops_per_s=ops / 2, int8_ops_per_s=ops)


def test_bound_by_memory() -> None:
    """Prefill reads 140 bytes; the second token 140 and a cache of 3 tokens for each of 2 requests."""
    assert bound_tps(peaks(1.0, 1e9), SHAPE, BYTES, 2, 2, 2) == pytest.approx(4 / (140 + 140 + 2 * 3 * 12))


def test_bound_by_arithmetic() -> None:
    """Per request: prefill 2*100*2 + 2*20 + 20*(1+2), the second token 2*100 + 2*20 + 20*3."""
    prefill, decode = 400 + 40 + 60, 200 + 40 + 60
    assert bound_tps(peaks(1e9, 1.0), SHAPE, BYTES, 2, 2, 2) == pytest.approx(4 / (2 * (prefill + decode)), rel=1e-4)


def test_each_step_is_bound_by_what_is_slower_for_it() -> None:
    both = bound_tps(peaks(1.0, 5.0), SHAPE, BYTES, 1, 2, 2)
    assert both == pytest.approx(2 / (max(140, 500 / 5) + max(140 + 36, 300 / 5)))


def test_floats_compute_at_the_faster_of_fp32_and_bf16() -> None:
    assert Peaks(1, 10, 3, 99).ops_per_s("float") == 10
    assert Peaks(1, 3, 10, 99).ops_per_s("float") == 10
    assert Peaks(1, 3, 10, 99).ops_per_s("int8") == 99


def test_our_formats_count_their_scales_and_the_head_that_they_have() -> None:
    assert (WEIGHTS["sym_int4"].bits, WEIGHTS["sym_int4"].head_bits) == (4.5, 8.5)
    assert (WEIGHTS["asym_int4"].bits, WEIGHTS["fp8_e4m3"].bits, WEIGHTS["sym_int8"].bits) == (5, 8.5, 8.5)
    assert (WEIGHTS["bf16"].bits, WEIGHTS["bf16"].head_bits) == (16, 16)


def test_shape_of_a_config(model: Path) -> None:
    """Hidden 64, heads of 16: attention 2*64*64 + 2*64*32, MLP 3*64*128, two layers; head 64*512."""
    assert ModelShape.read(model) == ModelShape(2 * (12288 + 24576), 32768, 2, 64, 32)


def test_a_model_of_another_kind_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BenchmarkError, match="no roofline for this model"):
        ModelShape.read(tmp_path)


def test_requests_in_step_have_the_closer_bound(writer: PromptWriter) -> None:
    plain = LoadOptions(prompt="8", output="4", arrivals="closed:2", requests=2)
    work = make_work(plain, writer)
    assert work.arrivals == ClosedLoop(2)
    closer = bound_tps(peaks(1.0, 5.0), SHAPE, WEIGHTS["bf16"], 2, 8, 4)
    assert bound_of(plain, work, peaks(1.0, 5.0), SHAPE, "bf16") == closer
    assert closer < work_bound_tps(peaks(1.0, 5.0), SHAPE, WEIGHTS["bf16"], [[(8, 4)]] * 2, 2, 0, 0.0)


def test_other_work_is_bound_by_all_that_it_reads() -> None:
    """Two users with three sessions, 9 tokens out: 5 steps of the longest session, 140 bytes each.

    The second to fourth token after 4 read caches of 5, 6 and 7 tokens, the second one after 2 one of 3.
    """
    sessions = [[(4, 4), (2, 1)], [(2, 2)], [(2, 2)]]
    found = work_bound_tps(peaks(1.0, 1e9), SHAPE, BYTES, sessions, 2, 0, 0.0)
    assert found == pytest.approx(9 / (5 * 140 + (5 + 6 + 7 + 3 + 3) * 12))
    # One user after the other has as many steps as tokens, and an open loop cannot end before the last has come.
    alone = work_bound_tps(peaks(1.0, 1e9), SHAPE, BYTES, sessions, 1, 0, 0.0)
    assert alone < 9 / (9 * 140)
    assert work_bound_tps(peaks(1e9, 1e9), SHAPE, BYTES, sessions, None, 0, 3.0) == pytest.approx(3)


def test_other_work_is_bound_by_its_arithmetic_and_shares_what_was_computed() -> None:
    """A turn of 3 in, 2 out computes 4 tokens, which attend to 1 to 4; two tokens come out of the head."""
    once = 200 * 4 + 40 * 2 + 20 * (1 + 2 + 3 + 4)
    assert work_bound_tps(peaks(1e9, 1.0), SHAPE, BYTES, [[(3, 2)]], 1, 0, 0.0) == pytest.approx(2 / once)
    # The second session has the first two tokens of the first; its own two attend to 3 and 4.
    second = 200 * 2 + 40 * 2 + 20 * (3 + 4)
    found = work_bound_tps(peaks(1e9, 1.0), SHAPE, BYTES, [[(3, 2)], [(3, 2)]], 2, 2, 0.0)
    assert found == pytest.approx(4 / (once + second))
    # A second turn adds its own tokens alone, which attend to the four before them.
    turn = 200 * 2 + 40 * 2 + 20 * (5 + 6)
    found = work_bound_tps(peaks(1e9, 1.0), SHAPE, BYTES, [[(3, 2), (1, 2)]], 1, 0, 0.0)
    assert found == pytest.approx(4 / (once + turn))


def test_every_kind_of_work_has_a_bound_but_one_that_is_measured_in_part(writer: PromptWriter) -> None:
    for changed in (
        LoadOptions(prompt="uniform:4:8", output="4", arrivals="closed:2", requests=2),
        LoadOptions(prompt="8", output="4", arrivals="poisson:2", requests=2),
        LoadOptions(prompt="8", output="4", arrivals="closed:2", requests=2, turns=2),
        LoadOptions(prompt="8", output="4", arrivals="closed:2", requests=2, prefix=4),
    ):
        assert bound_of(changed, make_work(changed, writer), peaks(1.0, 5.0), SHAPE, "bf16")
        warm = replace(changed, warmup=1)
        assert bound_of(warm, make_work(warm, writer), peaks(1.0, 5.0), SHAPE, "bf16") is None
