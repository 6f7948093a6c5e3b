"""Reference of the Python API: a page for each public package, from its `__all__`. Imports nothing of the package."""

from __future__ import annotations

import ast
import functools
import pathlib

# Public packages that `lepton_xla` itself does not export; a test compares all with those whose names need an example.
FURTHER = (
    "lepton_xla.learning",
    "lepton_xla.optimization",
    "lepton_xla.quant",
    "lepton_xla.recipe",
    "lepton_xla.serve",
    "lepton_xla.serve.client",
    "lepton_xla.train.distillation",
)


def packages(root: pathlib.Path) -> list[str]:
    """The public packages."""
    names = [f"lepton_xla.{name}" for name in exports(_tree(_file(root, "lepton_xla")))]
    return sorted(["lepton_xla", *(name for name in names if _file(root, name).is_file()), *FURTHER])


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
