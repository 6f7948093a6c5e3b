"""What every error of the package may say, from the places that raise it."""

from __future__ import annotations

import ast
import inspect
import pathlib
from collections import defaultdict

from lepton_xla import errors
from manual.tables import code, plain


def page(root: pathlib.Path) -> str:
    """The messages of every error class, searchable by their words."""
    intro = (
        "# Error messages\n\nEvery error that you can cause is a `LeptonError`; a command prints its message as one "
        "line. Here is what each class may say, for the search to find; words in angle brackets stand for what the "
        "message names. [Faults](../faults.md) says what to do about each class.\n\n"
    )
    parts = [intro]
    found = messages(root)
    for name in classes():
        lines = sorted(found.get(name, ()), key=str.casefold)
        parts.append(f"## {name}\n\n{plain((inspect.getdoc(getattr(errors, name)) or '').splitlines()[0])}\n\n")
        parts += [f"- {code(line)}\n" for line in lines]
        parts.append("\n")
    return "".join(parts)


def classes() -> list[str]:
    """Names of the error classes."""
    return [
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.LeptonError) and kind is not errors.LeptonError
    ]


def messages(root: pathlib.Path) -> dict[str, set[str]]:
    """Class -> messages that are written where it is made."""
    known, found = set(classes()), defaultdict[str, set[str]](set)
    for path in sorted((root / "lepton_xla").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func).rpartition(".")[2]) in known:
                for argument in node.args:
                    text = _text(argument)
                    if text is not None and " " in text:
                        found[name].add(" ".join(text.split()))
    return found


def _text(node: ast.expr) -> str | None:
    """A text with what is filled in named; None where it is written elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        named = node.value
        while isinstance(named, ast.Call) and named.args:
            named = named.args[0]
        return f"<{ast.unparse(named).rpartition('.')[2][:30]}>"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left) or "<...>") + (_text(node.right) or "<...>")
    return None
