"""The package as a whole: its public names, which part may import which, and what nothing in it may do."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1] / "lepton_xla"
FILES = {
    ".".join(("lepton_xla", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}

PUBLIC = [
    "ArtifactError", "CalibrationError", "CompileError", "ExecutionError", "InputError", "LeptonError", "ModelError",
    "ModelSpec", "PassReport", "Plan", "Program", "Recipe", "RecipeError", "Servable", "ServeError", "SiteReport",
    "TensorSpec", "UnsupportedError", "compile", "find_sites", "from_linen", "from_nnx", "load", "optimize", "passes",
    "trace", "train", "verify",
]  # fmt: skip


def test_public_names():
    import lepton_xla

    assert sorted(lepton_xla.__all__) == sorted(PUBLIC)
    assert list(lepton_xla.__all__) == sorted(lepton_xla.__all__)
    for name in PUBLIC:
        assert getattr(lepton_xla, name) is not None


# Imports.


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


def reached(module):
    """Modules of the package that importing `module` imports, itself included, the root package left out."""
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name in seen or name == "lepton_xla" or name not in FILES:
            continue
        seen.add(name)
        # Importing a module imports the packages above it.
        todo += [name.rpartition(".")[0], *imports(name, everywhere=False)]
    return seen


def part(module):
    """The first part below the root: `passes` for `lepton_xla.passes.core.walker`."""
    return module.split(".")[1] if module.count(".") else ""


# What each part may import, besides itself. Parts that are not listed here are at the bottom: errors, data.
BOTTOM = {"errors", "report", "trees", "program", "_compat"}
PASSES = BOTTOM | {"quant", "passes"}
ALLOWED = {
    "errors": set(),
    "report": set(),
    "_compat": set(),
    "trees": {"errors"},
    "program": {"errors", "report", "trees"},
    "adapters": {"errors", "program", "trees", "_compat"},
    "rows": {"errors", "program"},
    "callbacks": BOTTOM,
    "flags": set(),
    "quant": {"errors", "_compat"},
    "passes": BOTTOM | {"quant", "recipe"},
    "recipe": {"errors", "quant"},
    "modelspec": BOTTOM | {"adapters"},
    "optimization": PASSES | {"recipe", "rows", "callbacks", "flags"},
    "compiler": BOTTOM | {"rows", "callbacks", "flags"},
    "serve": {"errors", "program", "compiler"},
    "train": PASSES | {"recipe", "sharding"},
    "sharding": BOTTOM,
    "kernels": {"errors", "_compat"},
    "tuning": PASSES | {"recipe", "optimization", "compiler", "modelspec"},
}
# For the checker of types only, or inside a function that neither loading nor serving calls.
TYPES_ONLY = {("compiler", "passes")}
# At the top: may import everything but each other's insides.
TOP = {"", "cli", "__main__"}


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    here = part(module)
    if here in TOP:
        return
    assert here in ALLOWED, f"say in ALLOWED what {here!r} may import"
    running = {part(name) for name in imports(module, everywhere=False) if name in FILES}
    anywhere = {part(name) for name in imports(module) if name in FILES}
    types = {there for user, there in TYPES_ONLY if user == here}
    assert running - {here} <= ALLOWED[here]
    assert anywhere - {here} <= ALLOWED[here] | types


# What a process that serves has no use for.
OFFLINE = {"passes", "quant", "recipe", "optimization", "tuning"}


def test_a_serving_process_reaches_no_pass():
    for module in FILES:
        if part(module) == "serve":
            held = {
                name
                for name in reached(module)
                if part(name) in {"passes", "quant", "recipe", "optimization", "tuning"}
            }
            assert not held, f"{module} imports {sorted(held)}"


def test_the_artifact_loader_reaches_no_pass():
    loader = reached("lepton_xla.compiler.loading")
    assert "lepton_xla.compiler" in loader
    assert not {name for name in loader if part(name) in {"passes", "quant", "recipe", "optimization", "serve", "cli"}}


# JAX's internals.

INTERNALS = {"lepton_xla._compat", "lepton_xla.compiler._xla"}


@pytest.mark.parametrize("module", FILES)
def test_internals_of_jax_stay_in_their_file(module):
    if module in INTERNALS:
        return
    inside = {name for name in imports(module) if name.startswith(("jax._src", "jax.extend", "jaxlib"))}
    assert not inside
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            assert not ast.unparse(node).startswith(("jax._src", "jax.extend")), f"line {node.lineno}"
        if isinstance(node, ast.Compare):  # a version may be written down, not acted on
            assert "jax.__version" not in ast.unparse(node), f"line {node.lineno}"


# No code out of data.

UNPICKLERS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "copyreg"}


def unpickling(tree):
    """Lines of a module that import a pickler or call something that unpickles."""
    return sorted({node.lineno for node in ast.walk(tree) if _unpickles(node)})


def _unpickles(node):
    names = []
    match node:
        case ast.Import():
            names = [alias.name for alias in node.names]
        case ast.ImportFrom():
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        case ast.Attribute():
            names = [ast.unparse(node)]
        case ast.Call():
            if any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords):
                return True
            if ast.unparse(node.func).rpartition(".")[2] in ("__import__", "import_module"):
                names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
    parts = [name.split(".") for name in names]
    return any(path[0] in UNPICKLERS or "serialize_executable" in path for path in parts)


@pytest.mark.parametrize("module", FILES)
def test_nothing_unpickles(module):
    assert not unpickling(TREES[module])


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy, joblib as j",
        "importlib.import_module('dill')",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "from jax.experimental import serialize_executable",
        "from jax.experimental.serialize_executable import serialize",
        "jax.experimental.serialize_executable.deserialize_and_load(blob)",
    ],
)
def test_the_check_sees_what_unpickles(line):
    assert unpickling(ast.parse(line)) == [1]


def test_the_check_lets_the_rest_pass():
    lines = ("np.load(path, allow_pickle=False)", "compiled.serialize()", "client.deserialize_executable(blob)")
    assert not unpickling(ast.parse("\n".join(lines)))


# The machine it was written on.


def test_no_path_of_a_machine_is_in_the_package():
    # A path written out: `/work/...`, `/root/...`, `/home/name/...`, `C:\\...`; not the `/` of a URL or of names.
    machine = re.compile(r"(?<![\w/.:\]}-])/(?:work|root|home|Users)/|\b[A-Z]:\\\\")
    assert machine.search("open('/work/main')")
    assert not machine.search("https://example.com/work/1 and a/root/b")
    for path in sorted(path for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        found = machine.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found}"
