"""JSON schemas as people write them for structured output, made at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

WORDS = ["name", "city", "size", "kind", "color", "status", "tags", "owner", "items", "price", "notes", "active"]


def random_schema(rng: random.Random) -> dict[str, Any]:
    """A schema of an object: nested objects, arrays, enumerations, bounded strings and numbers, optional keys."""
    return _object(rng, 0)


def is_trivial(value: Any) -> bool:
    """Whether a value holds fewer than two leaves."""
    return _num_leaves(value) < 2


def _num_leaves(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_num_leaves, value.values()))
    if isinstance(value, list):
        return sum(map(_num_leaves, value))
    return 1


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 4))
    required = [name for name in names if rng.random() < 0.7]
    properties = {name: _value(rng, depth + 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _value(rng, depth + 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _enumeration(rng: random.Random, _: int) -> dict[str, Any]:
    return {"enum": rng.choice([["red", "green"], [1, 2, 3], ["a", None, 7], ["ü", "\n", '"']])}


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    least = rng.randint(0, 3)
    bounded = {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}
    return rng.choice([bounded, {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"}])


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    least = rng.randint(-50, 50)
    bounds = {"minimum": least, "maximum": least + rng.randint(0, 1000)}
    return {"type": rng.choice(["integer", "number"]), **bounds}


def _constant(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null"])}


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds: list[Callable[[random.Random, int], dict[str, Any]]] = [_enumeration, _string, _number, _constant]
    if depth < 3:
        kinds += [_object, _array]
    return rng.choice(kinds)(rng, depth)
