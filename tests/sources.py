"""The package's own source, and what each of its modules imports."""

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1] / "lepton_xla"
FILES = {
    ".".join(("lepton_xla", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


@functools.cache
def imports(module, *, everywhere=True):
    """Dotted names that a module imports.

    With `everywhere` unset, only what runs when the module is imported: not inside functions or `TYPE_CHECKING`.
    """
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in _statements(TREES[module], everywhere):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (parent, node.module) if part)
            names = {f"{source}.{alias.name}" for alias in node.names}
            # `from package import module` imports the module, `from module import name` only `module`.
            found.update(source if name not in FILES and source in FILES else name for name in names)
    return found


def _statements(tree, everywhere):
    for node in ast.iter_child_nodes(tree):
        if not everywhere:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
        yield node
        yield from _statements(node, everywhere)
