"""Reference of the Python API: a page for each public package, from its `__all__`. Imports nothing of the package."""

from __future__ import annotations

import ast
import functools
import pathlib


def packages(root: pathlib.Path) -> list[str]:
    """The public packages: those of which a test asks for an example of every name."""
    for node in _tree(root / "tests" / "test_docstrings.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PUBLIC":
            return sorted(ast.literal_eval(node.value))
    raise ValueError("tests/test_docstrings.py has no PUBLIC")


def pages(root: pathlib.Path) -> dict[str, str]:
    """Uri -> Markdown, in which mkdocstrings fills in each name."""
    found: dict[str, str] = {}
    shown: dict[str, str] = {}  # of a name that several packages have, the first one has the text
    public = packages(root)
    for package in public:
        tree = _tree(_file(root, package))
        names = [name for name in exports(tree) if f"{package}.{name}" not in public]
        lines = [f"# {package}", "", _summary(tree), ""]
        for name in names:
            place = shown.setdefault(_home(tree, package, name, root), f"{package}.{name}")
            if place == f"{package}.{name}":
                lines += [f"::: {place}", ""]
            else:
                lines += [f"## {name}", "", f"See [`{place}`][{place}].", ""]
        found[f"reference/python/{package}.md"] = "\n".join(lines)
    return found


def docstring(root: pathlib.Path, name: str) -> str:
    """The docstring of a public name."""
    package, _, attribute = name.rpartition(".")
    module, _, attribute = _home(_tree(_file(root, package)), package, attribute, root).rpartition(".")
    file = _file(root, module)
    for node in _tree(file).body if file.is_file() else []:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == attribute:
            return ast.get_docstring(node) or ""
    return ""


def exports(tree: ast.Module) -> list[str]:
    """What `__all__` lists."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError("there is no __all__")


def _file(root: pathlib.Path, module: str) -> pathlib.Path:
    path = root / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _tree(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _summary(tree: ast.Module) -> str:
    return ast.get_docstring(tree) or ""


def _home(tree: ast.Module, package: str, name: str, root: pathlib.Path) -> str:
    """The module that defines a name, followed through the packages that pass it on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    file = _file(root, node.module)
                    if not file.is_file():
                        return f"{node.module}.{alias.name}"
                    return _home(_tree(file), node.module, alias.name, root)
    return f"{package}.{name}"
