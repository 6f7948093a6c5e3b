"""Writes recipes as TOML, so that what was found can be read, changed and used again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from lepton_xla.recipe.recipes import Recipe


def to_toml(recipe: Recipe) -> str:
    """Write a recipe as TOML text; keys with their default values are left out.

    `Recipe.parse` of the text gives an equal recipe.

    >>> from lepton_xla.recipe import to_toml
    >>> recipe = lx.Recipe.load("int8-weight-only")
    >>> lx.Recipe.parse(to_toml(recipe), name="again") == recipe
    True
    >>> print(to_toml(lx.Recipe.parse('cast = "bfloat16"', name="half")), end="")
    name = "half"
    cast = "bfloat16"
    """
    plain, usual = msgspec.to_builtins(recipe), msgspec.to_builtins(type(recipe)())
    lines = [f"{key} = {_value(value)}" for key, value in plain.items() if _is_plain(value) and value != usual[key]]
    if plain["shrink"] is not None:
        lines += ["", "[shrink]", *_table(plain["shrink"])]
    for kind in ("prune", "quantize"):
        for block in plain[kind]:
            lines += ["", f"[[{kind}]]", *_table(block)]
    return "\n".join(lines) + "\n"


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _table(block: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in block.items() if value is not None and value not in ("", [])]


def _value(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists are TOML too, but for the character DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
