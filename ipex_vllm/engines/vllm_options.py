"""A listing of vLLM's options, kept between starts: importing vLLM to read a flag takes ten seconds.

From it come quick answers: to a wrong flag, --help, --explain. An engine starts with what vLLM's own parser says.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ipex_vllm.machine.facts import user_cache

CONTENT = "engine and front end"  # what a listing has: another one is not read
SIMPLE = (str, int, float, bool, type(None))
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def count(text: str) -> int:
    """A number as vLLM reads it: 2000, 2k (thousand), 2K (1024), 2.5k, and -1 or auto."""
    if text.strip().lower() in ("auto", "-1"):
        return -1
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a number, as in 2000, 2k or 2K, not {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


# By the names of vLLM's functions; what is not here is taken as a text, and checked by vLLM when it starts.
TYPES: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "human_readable_int": count,
    "human_readable_int_or_auto": count,
}


def add_listed(parser: argparse.ArgumentParser) -> bool:
    """Add vLLM's options as the listing has them; False if there is none of the vLLM that is installed."""
    try:
        groups = json.loads(listing_path().read_text())
    except (OSError, ValueError, ModuleNotFoundError):
        return False
    for title, description, options in groups:
        is_common = title == parser._optionals.title
        group = parser._optionals if is_common else parser.add_argument_group(title, description)
        for flags, keywords in options:
            if keywords.pop("is_boolean", False):
                keywords["action"] = argparse.BooleanOptionalAction
            elif "type" in keywords:
                keywords["type"] = TYPES[keywords["type"]]
            group.add_argument(*flags, **keywords)
    return True


def keep_listing(parser: argparse.ArgumentParser, own: set[str]) -> None:
    """Write the listing of a parser that has vLLM's options beside those whose destinations are `own`."""
    groups = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.option_strings and action.dest not in own]
        if actions:
            options = [(flags_of(action), keywords_of(action)) for action in actions]
            groups.append((group.title, group.description, options))
    # Where nothing can be written, every start is as slow as the first.
    with contextlib.suppress(OSError):
        path = listing_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(groups))
        draft.replace(path)


def flags_of(action: argparse.Action) -> list[str]:
    if isinstance(action, argparse.BooleanOptionalAction):  # it adds the negative ones itself
        return [flag for flag in action.option_strings if not flag.startswith("--no-")]
    return list(action.option_strings)


def keywords_of(action: argparse.Action) -> dict[str, Any]:
    """The arguments of `add_argument` for an option like this one."""
    default = action.default if isinstance(action.default, SIMPLE) else None
    keywords: dict[str, Any] = {"dest": action.dest, "default": default, "help": action.help}
    if isinstance(action, argparse.BooleanOptionalAction):
        # It adds the default to its help itself.
        return keywords | {"is_boolean": True, "help": (action.help or "").removesuffix(" (default: %(default)s)")}
    if action.nargs == 0:
        return keywords | {"action": "store_true"}
    name = getattr(action.type, "__name__", "")
    if name in TYPES:
        keywords["type"] = name
    if action.choices is not None:
        keywords["choices"] = [choice for choice in action.choices if isinstance(choice, SIMPLE)]
    return keywords | {"nargs": action.nargs, "metavar": action.metavar}


def listing_path() -> Path:
    """The listing of the installed vLLM, by its place and the time it was written. Raises ModuleNotFoundError."""
    found = importlib.util.find_spec("vllm")  # which imports nothing
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'vllm'")
    source = Path(found.origin).with_name("engine") / "arg_utils.py"
    key = hashlib.sha256(f"{source} {source.stat().st_mtime_ns} {CONTENT}".encode()).hexdigest()[:16]
    return user_cache() / f"vllm-options-{key}.json"
