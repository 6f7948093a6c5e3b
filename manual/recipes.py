"""Reference of recipes: keys from the types that read them, and the presets."""

from __future__ import annotations

import inspect
import re
import types
import typing
from typing import Any, get_args, get_origin

import msgspec

from lepton_xla.recipe import PruneRule, QuantizeRule, Recipe, ShrinkRule, preset_text, presets
from manual.tables import code, table

TABLES: dict[str, type[msgspec.Struct]] = {
    "Keys of the recipe": Recipe,
    "[shrink]": ShrinkRule,
    "[[prune]]": PruneRule,
    "[[quantize]]": QuantizeRule,
}


def page() -> str:
    """Every key, and every preset."""
    intro = (
        "# Recipes\n\nA recipe is a TOML file, a preset's name, or a [`Recipe`](python/lepton_xla.recipe.md). "
        "An unknown key is an error.\n\n"
    )
    parts = [intro]
    for title, kind in TABLES.items():
        texts = {name: text for each in reversed(kind.__mro__) for name, text in attributes(each.__doc__ or "").items()}
        hints = typing.get_type_hints(kind, include_extras=True)
        rows = [
            (code(field.name), f"{texts[field.name]} {_said(values(hints[field.name]), _default(field))}")
            for field in msgspec.structs.fields(kind)
        ]
        parts.append(f"## {title.replace('[', chr(92) + '[')}\n\n")
        parts.append(table(["key", "meaning"], rows) + "\n")
    parts.append("## Presets\n\nEach is a file that you can copy and change: `leptonx recipes NAME` prints it.\n\n")
    for name in presets():
        parts.append(f"### {name}\n\n```toml\n{preset_text(name).rstrip()}\n```\n\n")
    return "".join(parts)


def attributes(docstring: str) -> dict[str, str]:
    """The texts of a docstring's section `Attributes`, by name.

    >>> attributes("A.\\n\\nAttributes:\\n    a: one\\n        and more.\\n    b, c: two.\\n")
    {'a': 'one and more.', 'b': 'two.', 'c': 'two.'}
    """
    section = re.search(r"^Attributes:\n((?: {4}.*\n|\n)+)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.findall(r"^ {4}(\S[^:]*): ((?:.*\n)(?: {8}.*\n)*)", section[1] if section else "", re.MULTILINE):
        found |= {name.strip(): " ".join(entry[1].split()) for name in entry[0].split(",")}
    return found


def values(hint: Any) -> str:
    """What a key may be, in a few words."""
    if isinstance(hint, typing.TypeAliasType):
        return values(hint.__value__)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        pattern = next((meta.pattern for meta in parts[1:] if getattr(meta, "pattern", None)), None)
        return _pattern(pattern) if pattern else values(parts[0])
    if origin is typing.Literal:
        return ", ".join(map(str, parts))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(values(part) for part in parts if part is not type(None))
    if origin is tuple:
        return f"list of {values(parts[0])}"
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return "table"
    return {"str": "text", "bool": "true, false", "float": "number", "int": "whole number"}.get(hint.__name__, "")


def _pattern(pattern: str) -> str:
    """The alternatives of a regular expression `^(a|b:number)$`.

    >>> _pattern(r"^(none|smooth:(0|1)|\\d{1,4}:\\d{1,4})$")
    'none, smooth:..., N:M'
    """
    found, depth = [""], 0
    for character in pattern.removeprefix("^(").removesuffix(")$"):
        depth += (character == "(") - (character == ")")
        if character == "|" and not depth:
            found.append("")
        else:
            found[-1] += character
    found = [each.replace(r"\d{1,4}:\d{1,4}", "N:M") for each in found]
    return ", ".join(each if each == "N:M" else re.sub(r":.*", ":...", each) for each in found)


def _said(allowed: str, default: str) -> str:
    """Values and default: two columns are all that a phone has room for."""
    return f"<br>Values: {code(allowed)}. Default: {code(default)}."


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default is msgspec.NODEFAULT:
        return "required" if field.required else "none"
    if field.default in (None, (), ""):
        return "none"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
