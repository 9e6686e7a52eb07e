"""How fast this machine multiplies in 16 bits and in float32: measured, since its CPU flags do not tell.

One processor with AVX-512 BF16 computes in float32 at twice its speed in bfloat16, another at half of it, one with AMX
at a fifth, and how much of that is left for a few rows depends on its memory. Ours (`kernels/w16a16.py`) is another
choice. PyTorch is imported in a process of its own, so that what asks here needs none; what was measured is kept for
the next start, unless other work had the cores meanwhile: a call of a millisecond that waits for a time slice takes
eight.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from ipex_vllm.low_bit import library_digest
from ipex_vllm.machine.facts import MachineFacts, user_cache

OUTPUTS, INPUTS = 5632, 2048  # of the layer: a 1.1 B model's largest
ROWS = (1, 16, 256)  # decoding at 1 and at 16 streams, and a prompt
DTYPES = ("bfloat16", "float16", "float32")
OWN = " by our kernel"  # behind a dtype
CALLS, CALLS_S = 3, 0.05  # so many for each dtype and number of rows, but no more once they took so many seconds
ATTEMPTS = 8  # at most, where other work takes the cores
WAITED_SHARE = 0.02  # of a call's time, the least that its threads waited for a core where other work had it
CACHE_BYTES = 256 << 20  # more than most CPUs have: a step finds no weight in it, since it read all others before
TIMEOUT_S = 30.0

# What else decides how fast oneDNN computes: a user may have told it to use less than the CPU has.
VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@dataclass(frozen=True)
class MatmulTimes:
    """Seconds of a layer's matmul, for as many rows each as ROWS has, by dtype; with OWN behind it by our kernel.

    `alone`: no other work had the cores meanwhile, as far as Linux can tell.
    """

    seconds: Mapping[str, Sequence[float]]
    alone: bool = True

    def describe(self, ways: Iterable[str]) -> str:
        """The times in words."""
        times = (f"{way} {', '.join(f'{1e3 * each:.2g}' for each in self.seconds[way])}" for way in ways)
        told = f"ms for {', '.join(map(str, ROWS))} rows of a {OUTPUTS}x{INPUTS} layer: {'; '.join(times)}"
        return told if self.alone else f"{told}; beside other work, so the next start measures again"


def matmul_times(machine: MachineFacts, cores: Sequence[int]) -> MatmulTimes | None:
    """The times on the logical CPUs `cores`, as an earlier start kept them or measured now; None if neither can be.

    What was measured beside other work is not kept.
    """
    try:
        path = kept_path(machine, len(cores))
    except metadata.PackageNotFoundError:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return read(path.read_text())
    command = [sys.executable, "-m", __name__, *map(str, cores)]
    try:
        # One thread for each core: OpenMP reads this when it is loaded.
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        times = read(done.stdout)
    except (OSError, ValueError, KeyError, TypeError, subprocess.SubprocessError):
        return None
    if not times.alone:
        return times
    with contextlib.suppress(OSError):  # where nothing can be written, each start measures
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(done.stdout)
        draft.replace(path)
    return times


def kept_path(machine: MachineFacts, num_cores: int) -> Path:
    """Where the times of this machine, PyTorch and number of cores are kept. Raises PackageNotFoundError."""
    set_variables = [os.environ.get(name) for name in VARIABLES]
    versions = (metadata.version("torch"), library_digest())
    facts = (machine.name, machine.isa, num_cores, versions, set_variables, OUTPUTS, INPUTS, ROWS)
    return user_cache() / f"matmul-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"


def read(text: str) -> MatmulTimes:
    """The times that this module prints when it runs. Raises ValueError, KeyError and TypeError for another text."""
    found = json.loads(text)
    seconds = {way: tuple(map(float, times)) for way, times in found["seconds"].items()}
    if missing := {*DTYPES} - {*seconds}:
        raise KeyError(f"no times for {missing}")
    if any(len(times) != len(ROWS) or min(times) <= 0 for times in seconds.values()):
        raise ValueError(f"not as many times as {ROWS} has: {text}")
    return MatmulTimes(seconds, bool(found["alone"]))


def measure() -> MatmulTimes:
    """The times with PyTorch's threads as they are: in half a second, more on a slow or busy machine."""
    import torch

    from ipex_vllm.low_bit.kernels import w16a16

    times: dict[str, list[tuple[float, bool]]] = {}
    with torch.inference_mode():
        others = torch.ones(CACHE_BYTES // 4)
        for name in DTYPES:
            weight = torch.ones(OUTPUTS, INPUTS, dtype=getattr(torch, name))
            times[name] = [call_time(vllm_call(weight, rows), others) for rows in ROWS]
            if weight.dtype in w16a16.WEIGHT_DTYPES and w16a16.unavailable_reason() is None:
                packed = w16a16.pack(weight)
                calls = [partial(w16a16.linear, ones(rows, weight.dtype), packed, None, OUTPUTS) for rows in ROWS]
                times[name + OWN] = [call_time(call, others) for call in calls]
    seconds = {way: [took for took, _ in of_rows] for way, of_rows in times.items()}
    return MatmulTimes(seconds, all(alone for of_rows in times.values() for _, alone in of_rows))


def ones(rows: int, dtype: Any) -> Any:
    """Activations [rows, INPUTS]."""
    import torch

    return torch.ones(rows, INPUTS, dtype=dtype)


def vllm_call(weight: Any, rows: int) -> Callable[[], object]:
    """What multiplies with `weight` [out, in] as vLLM does.

    By oneDNN with the weight packed, where it takes the dtype; `F.linear` in float32 is MKL's.
    """
    import torch

    x = ones(rows, weight.dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    except RuntimeError:
        return partial(torch.nn.functional.linear, x, weight)
    return partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")


def call_time(multiply: Callable[[], object], others: Any) -> tuple[float, bool]:
    """Seconds of a call that reads its weight from memory, at best; `others` takes its place in the caches.

    And whether no other work had the cores meanwhile. Calls during which it had count if there were no others.
    """
    first, alone = timed(multiply)  # oneDNN makes its code
    if first > 10 * CALLS_S:  # slow by far, whatever is added for that
        return first, alone
    undisturbed: list[float] = []
    disturbed: list[float] = []
    for _ in range(ATTEMPTS):
        others.add_(1)
        seconds, alone = timed(multiply)
        (undisturbed if alone else disturbed).append(seconds)
        if len(undisturbed) == CALLS or sum(undisturbed) >= CALLS_S:
            break
    return min(undisturbed or disturbed), bool(undisturbed)


def timed(call: Callable[[], object]) -> tuple[float, bool]:
    """Seconds of one call, and whether its threads had the cores all the time."""
    waited, begin = seconds_waited(), time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    return seconds, seconds_waited() - waited < WAITED_SHARE * seconds


def seconds_waited() -> float:
    """For how long this process's threads, together, could have run and had no core; 0 where Linux does not count."""
    waited = 0
    for statistics in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            waited += int(statistics.read_text().split()[1])
    return waited / 1e9


if __name__ == "__main__":
    os.sched_setaffinity(0, set(map(int, sys.argv[1:])))
    print(json.dumps(asdict(measure())))
