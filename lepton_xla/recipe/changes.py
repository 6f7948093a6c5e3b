"""Changes to a recipe by dotted keys, such as `quantize.0.weights`, from Python or the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_xla.errors import RecipeError

_BLOCKS = ("prune", "quantize")


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse `key=value`. The value is TOML or a bare word; an empty one means the default and gives None.

    Raises:
        RecipeError: if the text has another form.

    >>> parse_setting("quantize.0.weights=int4"), parse_setting("shrink.round_to=[8, 16]"), parse_setting("shrink=")
    (('quantize.0.weights', 'int4'), ('shrink.round_to', [8, 16]), ('shrink', None))
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise RecipeError(f"--set {text!r}: expected key=value, such as quantize.0.weights=int4")
    if not value:
        return key, None
    if not value.isprintable():
        raise RecipeError(f"--set {key}: the value has more than one line")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError) as error:
        if value[0] in "\"'{":
            raise RecipeError(f"--set {key}: {value} is not TOML: {error}") from error
        return key, value


def changed(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Change values of a recipe, given as plain dicts and lists.

    Args:
        recipe: the whole recipe; nested dicts and lists are changed in place.
        settings: dotted key -> value; None restores the default. The index after the last block appends a new block.

    Raises:
        RecipeError: if a key does not exist.

    >>> changed({"prune": [{"sites": ".*", "sparsity": 0.5}]}, {"prune.0.sparsity": 0.8, "cast": "bfloat16"})
    {'prune': [{'sites': '.*', 'sparsity': 0.8}], 'cast': 'bfloat16'}
    """
    whole = dict(recipe)
    for key, value in settings.items():
        *way, last = key.split(".")
        node: Any = whole
        for depth, part in enumerate(way):
            node = _entered(node, part, ".".join(way[: depth + 1]), new=[] if part in _BLOCKS and not depth else {})
        if isinstance(node, list):
            _entered(node, last, key, new=None)  # raises if it is not the index of a block
            raise RecipeError(f"{key}: name a key of the block, such as {key}.sites")
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return whole


def _entered(node: Any, part: str, at: str, *, new: Any) -> Any:
    if isinstance(node, list):
        if not (part.isascii() and part.isdigit()):
            raise RecipeError(f"{at}: give the index of the block, such as {at.rpartition('.')[0]}.0")
        if int(part) > len(node):
            kind = at.rpartition(".")[0]
            raise RecipeError(f"{at}: the recipe has {len(node)} [[{kind}]] blocks, counted from 0")
        if int(part) == len(node):
            node.append({})
        return node[int(part)]
    if node.get(part) is None:
        node[part] = new
    if not isinstance(node[part], dict | list):
        raise RecipeError(f"{at} is a value and has no keys of its own")
    return node[part]


def excluded(recipe: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """Add patterns to the exclusions of every block of a recipe, given as plain dicts and lists.

    Raises:
        RecipeError: if the recipe has no block.

    >>> excluded({"prune": [{"sites": ".*", "exclude": "stem"}]}, ["head"])
    {'prune': [{'sites': '.*', 'exclude': ['stem', 'head']}]}
    """
    whole = dict(recipe)
    tables = [block for kind in _BLOCKS for block in whole.get(kind) or ()]
    if not tables and not whole.get("shrink"):
        raise RecipeError("nothing to exclude from: the recipe has no [[prune]], [[quantize]] or [shrink]")
    for table in tables:
        table["exclude"] = [*_several(table.get("exclude")), *patterns]
    if whole.get("shrink"):
        whole["shrink"]["protect"] = [*_several(whole["shrink"].get("protect")), *patterns]
    return whole


def _several(patterns: Any) -> list[Any]:
    """One pattern or several as a list without empty ones."""
    return [pattern for pattern in ([patterns] if isinstance(patterns, str) else patterns or ()) if pattern]
