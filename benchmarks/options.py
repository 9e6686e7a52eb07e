"""Options of the benchmarks: dataclass fields, as `ipex_vllm.options` has them, read from YAML as well as from argv."""

from __future__ import annotations

import argparse
import signal
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from ipex_vllm import errors
from ipex_vllm import options as shared

T = TypeVar("T")


class BenchmarkError(errors.OptionError):
    """Something the user can mend; its text is the one line that says how."""


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add one flag for each field of the options dataclass `cls`; a field without a default must be given."""
    shared.add_options(parser, cls)
    for action in parser._actions:
        action.required = action.required or action.default is MISSING


def read_yaml(path: Path) -> Any:
    """Read a YAML file. Raises BenchmarkError."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BenchmarkError(f"{path}: {' '.join(str(error).split())}") from None


def from_mapping(cls: type[T], mapping: Any, where: str) -> T:
    """Build the dataclass `cls` from a mapping of a spec file.

    Raises BenchmarkError for what is no mapping, an unknown or missing key, or a value of the wrong type; `where`
    says in the message which part of the file it is. An int is taken where a float is wanted, a number where a str.
    """
    if not isinstance(mapping, Mapping):
        raise BenchmarkError(f"{where}: expected lines of the form `option: value`, got {mapping!r}")
    hints = get_type_hints(cls)
    entries = {entry.name: entry for entry in fields(cls)}  # type: ignore[arg-type]
    if unknown := [key for key in mapping if key not in entries]:
        raise BenchmarkError(f"{where}: there is no option {unknown[0]!r}; there are {', '.join(entries)}")
    for name, entry in entries.items():
        if name not in mapping and entry.default is MISSING and entry.default_factory is MISSING:
            raise BenchmarkError(f"{where}: option {name!r} is missing")
    return cls(**{name: _checked(value, hints[name], f"{where}: {name}") for name, value in mapping.items()})


def _checked(value: Any, hint: Any, where: str) -> Any:
    alternatives = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(get_origin(kind) or kind for kind in alternatives)
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if float in kinds:
            return float(value)
        if str in kinds:
            return str(value)
    raise BenchmarkError(f"{where} must be of type {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")


def run_main(main: Callable[[], int]) -> None:
    """Exit with the status of `main`; an error the user can mend becomes one line on stderr and status 2."""
    # SIGTERM is Ctrl-C: servers are stopped and results written either way.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        errors.run_main(main)
    except KeyboardInterrupt:
        sys.exit(130)
