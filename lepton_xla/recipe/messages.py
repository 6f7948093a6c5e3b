"""Turns errors of msgspec and tomllib about a recipe into one line that names the key and the value."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import msgspec

from lepton_xla.errors import first_line
from lepton_xla.recipe.rules import PruneRule, QuantizeRule, ShrinkRule

# Descriptions of valid values, for keys that take neither a plain type nor one of a few words.
_SPELLINGS = {
    "granularity": "channel, tensor, group:G or group:~G, G a whole number of at least 1",
    "calibration": "absmax, percentile:P with P in (0, 100], mse or entropy",
    "aggregate": "pooled, max, mean or ema:M with M in [0, 1), such as ema:0.9",
    "rescale": "none, awq or smooth:A with A in [0, 1]",
    "pattern": "unstructured, channel, N:M or block:RxC",
    "method": "magnitude, saliency, random, wanda, sparsegpt or deviation:F",
}


def reason(error: Exception, given: Any, root: type[msgspec.Struct]) -> str:
    """Describe an error in one line that names the key and the value.

    Args:
        error: from msgspec or tomllib.
        given: the TOML text, or the recipe as plain dicts and lists.
        root: the type of a whole recipe.

    >>> try:
    ...     msgspec.convert({"sites": 3}, PruneRule)
    ... except msgspec.ValidationError as error:
    ...     reason(error, {"sites": 3}, PruneRule)
    'sites = 3: expected `str`, got `int`'
    """
    said = first_line(error)
    place = re.fullmatch(r"(.*) - at `\$\.?(.*)`", said)
    if place is None:
        return _unknown_key(said, root, "")
    what, key = place[1], place[2]
    names = re.match(r"(?:(prune|quantize|shrink)\b(?:\[\d+\])?\.?)?(\w*)", key)
    assert names is not None
    table = {"prune": PruneRule, "quantize": QuantizeRule, "shrink": ShrinkRule}.get(names[1], root)
    if not names[2] or "unknown field" in what or "missing required field" in what:
        return _unknown_key(what, table, key)
    value = _value_at(given, key)
    if names[2] == "importance" and value == "taylor":
        return (
            "shrink.importance = 'taylor' needs a loss, which a file cannot hold: call lx.passes.shrink(program, "
            "importance='taylor', loss=..., calibration=...) and leave [shrink] out"
        )
    said = f"{key} = {value!r:.80}: " if value is not None else f"{key}: "
    if "matching regex" in what and names[2] in _SPELLINGS:
        return f"{said}expected {_SPELLINGS[names[2]]}"
    if what.startswith("Invalid enum value"):
        kind = get_type_hints(table)[names[2]]
        return f"{said}expected one of {', '.join(get_args(getattr(kind, '__value__', kind)))}"
    return said + what[:1].lower() + what[1:]


def _unknown_key(what: str, table: Any, where: str) -> str:
    """Describe an unknown or missing key, and suggest the nearest known one."""
    at = f"{where}: " if where else ""
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    if unknown is None:
        return at + what
    keys = list(table.__struct_fields__)
    near = difflib.get_close_matches(unknown[1], keys, 1, 0.75)
    return f"{at}unknown key {unknown[1]!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"keys are {', '.join(keys)}"
    )


def _value_at(given: Any, key: str) -> Any:
    """The value at a key such as `quantize[0].weights`; None if there is none."""
    try:
        value = tomllib.loads(given) if isinstance(given, str) else given
        for name in re.findall(r"\w+", key):
            value = value[int(name)] if isinstance(value, Sequence) else value[name]
    except (LookupError, TypeError, ValueError, RecursionError):
        return None
    return value
