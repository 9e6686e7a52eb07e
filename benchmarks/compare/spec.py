"""A comparison as its YAML file says it; `benchmarks/configs/` has examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load.generate import LoadOptions
from benchmarks.micro.bound import WEIGHTS
from benchmarks.options import BenchmarkError, from_mapping, read_yaml
from ipex_vllm.options import option

# Path into a run's summary -> whether more of it is better.
METRICS = {
    "output_tps": True,
    "requests_per_s": True,
    "goodput_rps": True,
    "ttft_s.p50": False,
    "tpot_s.p50": False,
    "itl_s.p99": False,
    "e2e_s.p50": False,
}


@dataclass(frozen=True, kw_only=True)
class SystemSpec:
    """A system to compare."""

    system: str = option("a name from benchmarks.compare.systems")
    format: str = option("its weights, for the system and the roofline: a name from benchmarks.micro.bound.WEIGHTS")
    flags: str = option("more of its command line, quoted as in a shell", "")
    env: dict[str, Any] = field(default_factory=dict, metadata={"help": "environment variables"})
    accuracy: str = option(
        "which line of docs/results/MACHINE/accuracy.json is its, as FORMAT/WHAT (`benchmarks.tables`)", ""
    )


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Systems, workloads, and how they are interleaved."""

    title: str = option("heading of the result")
    model: str = option("the model's directory, relative to the repository")
    baseline: str = option("the system that ratios are relative to")
    systems: dict[str, SystemSpec] = field(metadata={"help": "systems by the name they have in the result"})
    workloads: dict[str, LoadOptions] = field(metadata={"help": "loads by name: what each changes in `load`"})
    rounds: int = option("times that every system is visited at least", 4)
    noise_rounds: int = option("pairs of the noise floor", 5)
    precision: float | None = option(
        "visit on until each ratio's 95 % interval ends within this share of it (0.05: five percent)", None
    )
    minutes: float = option("with `precision`: begin no more rounds after so many", 20.0)
    resident: bool = option(
        "keep all systems in memory, all but one paused, instead of starting anew each visit", False
    )
    at_a_time: int = option("with `resident`: systems in memory beside the baseline, the rest later; 0 is all", 0)
    roofline: bool = option("measure the machine first and give shares of the bound", True)
    metrics: tuple[str, ...] = field(
        default=("output_tps", "ttft_s.p50", "tpot_s.p50"), metadata={"help": "what is compared, the main one first"}
    )
    port: int = option("the first of four ports per system", 24500)

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Read and check a spec file. Its `load` holds what all workloads share. Raises BenchmarkError."""
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise BenchmarkError(f"{path}: expected lines of the form `option: value`")
        common = content.pop("load", None) or {}
        for key in ("systems", "workloads"):
            if not isinstance(content.get(key), dict) or not content[key]:
                raise BenchmarkError(f"{path}: {key}: name at least one")
        content["systems"] = {
            name: from_mapping(SystemSpec, entry, f"{path}: systems: {name}")
            for name, entry in content["systems"].items()
        }
        content["workloads"] = {
            name: from_mapping(LoadOptions, {**common, **(entry or {})}, f"{path}: workloads: {name}")
            for name, entry in content["workloads"].items()
        }
        if isinstance(content.get("metrics"), list):
            content["metrics"] = tuple(content["metrics"])
        spec = from_mapping(cls, content, str(path))
        spec._check(path)
        return spec

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Split the systems into those that are interleaved with each other; the baseline is in every group."""
        others = [name for name in names if name != self.baseline]
        size = self.at_a_time if self.resident and self.at_a_time else len(others)
        starts = range(0, len(others), size) if others else [0]
        return [[self.baseline, *others[start : start + size]] for start in starts]

    def _check(self, path: Path) -> None:
        for name, system in self.systems.items():
            if system.format not in WEIGHTS:
                raise BenchmarkError(f"{path}: systems: {name}: format must be one of {', '.join(WEIGHTS)}")
        if self.baseline not in self.systems:
            raise BenchmarkError(f"{path}: baseline {self.baseline!r} is none of the systems {', '.join(self.systems)}")
        if min(self.rounds, self.noise_rounds) < 2:
            raise BenchmarkError(f"{path}: rounds must be at least 2, or there is no interval")
        if self.precision is not None and self.precision <= 0:
            raise BenchmarkError(f"{path}: precision must be above 0")
        if self.at_a_time < 0:
            raise BenchmarkError(f"{path}: at_a_time must be at least 0")
        if unknown := [metric for metric in self.metrics if metric not in METRICS]:
            raise BenchmarkError(f"{path}: metric {unknown[0]!r} is none of {', '.join(METRICS)}")
