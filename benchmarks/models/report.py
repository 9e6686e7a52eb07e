"""The table of docs/models.md, and whether each row of it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.models.zoo import ARCHITECTURES

FLOAT = "float"
FORMATS = (FLOAT, "sym_int8", "sym_int4")
HEAD = "| model | class | what is its own | float | largest difference | `sym_int8`, mean | `sym_int4`, mean |"

# In nats. float32 differs by the order of sums; what rounds activations, to 16 bits or 8, differs by that.
LARGEST_IN_FLOAT32 = 1e-3
MEAN_ROUNDED = 0.02
MEAN_ROUNDED_OF_VECTORS = 1e-3  # one minus the cosine

Result = Mapping[str, Any]


def holds(result: Result) -> bool:
    """Whether an answer is the model's: as near to Transformers' as its precision allows, and greedy text equal."""
    if "error" in result:
        return False
    architecture = ARCHITECTURES[result["name"]]
    in_float32 = result["format"] == FLOAT and architecture.dtype == "float32"
    mean = MEAN_ROUNDED_OF_VECTORS if architecture.task == "embed" else MEAN_ROUNDED
    is_near = result["largest"] < LARGEST_IN_FLOAT32 if in_float32 else result["mean"] < mean
    return bool(is_near and result["is_choice_same"])


def is_expected(result: Result) -> bool:
    """Whether it holds, or is known not to: a model that has become right has to lose that remark."""
    known = ARCHITECTURES[result["name"]].known.get(result.get("format", ""), "")
    return holds(result) != bool(known)


def write(path: Path, results: Iterable[Result]) -> None:
    """Put the table in place of the one in a Markdown file, which ends with it."""
    text = path.read_text()
    path.write_text(text[: text.index(HEAD)] + "\n".join(table(results)) + "\n")


def table(results: Iterable[Result]) -> Iterable[str]:
    yield HEAD
    yield "|---|---|---|---|---:|---:|---:|"
    rows: dict[str, dict[str, Result]] = {}
    for result in results:
        rows.setdefault(result["name"], {})[result.get("format", "")] = result
    for name, row in rows.items():
        architecture = ARCHITECTURES[name]
        family = architecture.config.removesuffix("Config")
        cells = [cell(row.get(FLOAT), "largest"), *(cell(row.get(name), "mean") for name in FORMATS[1:])]
        yield f"| {name} | {family} | {architecture.structure} | {architecture.dtype} | {' | '.join(cells)} |"


def cell(result: Result | None, figure: str) -> str:
    if result is None:
        return ""
    if "error" in result:
        return "does not run"
    return f"{result[figure]:.1e}" if holds(result) else f"**{result[figure]:.1e}**"
