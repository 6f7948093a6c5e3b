"""The package as a whole: its public names, what importing a part brings along, and what nothing in it may do."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from sources import FILES, ROOT, TREES, imports

import lepton_xla as lx
from lepton_xla.environment.extras import Needs

PUBLIC = [
    "ArtifactError", "CalibrationError", "CheckpointError", "CompileError", "ExecutionError", "FederatedError",
    "Generator", "InputError",
    "LaunchError", "LearningError", "LeptonError", "MissingPackageError", "ModelError", "ModelSpec", "PassReport",
    "Plan", "Program", "Recipe",
    "RecipeError", "RepositoryError", "SampleError", "Servable", "ServeError", "ShardingError", "SiteReport",
    "TensorSpec", "TrainingError", "TrustError", "TuningError", "UnsupportedError", "compile", "encrypt",
    "data", "evaluation", "explanation", "export", "federated", "find_sites",
    "from_linen", "from_nnx", "give_labels", "launch", "load", "optimize", "passes", "sharding", "sign",
    "take_categories", "take_images", "take_texts", "trace", "train", "trust", "tuning", "verify",
]  # fmt: skip


def test_public_names():
    import lepton_xla

    assert sorted(lepton_xla.__all__) == sorted(PUBLIC)
    assert list(lepton_xla.__all__) == sorted(lepton_xla.__all__)
    for name in PUBLIC:
        assert getattr(lepton_xla, name) is not None


# Imports.


@pytest.mark.parametrize("package", ["lepton_xla", "lepton_xla.compiler", "lepton_xla.serve", "lepton_xla.sharding"])
def test_names_that_are_imported_on_first_use_are_listed_and_found(monkeypatch, package):
    module = importlib.import_module(package)
    for name in module.__all__:
        found = getattr(module, name)
        monkeypatch.delattr(module, name)
        assert name in dir(module)
        assert getattr(module, name) is found
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


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

INTERNALS = {"lepton_xla._compat", "lepton_xla._jaxlib", "lepton_xla.compiler._mlir", "lepton_xla.compiler._xla"}


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


def test_no_path_of_a_machine_is_in_the_package_or_its_pages():
    # A path written out: `/work/...`, `/root/...`, `/home/name/...`, `C:\\...`; not the `/` of a URL or of names.
    machine = re.compile(r"(?<![\w/.:\]}-])/(?:work|root|home|Users)/|\b[A-Z]:\\\\")
    assert machine.search("open('/work/main')")
    assert not machine.search("https://example.com/work/1 and a/root/b")
    files = [path for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    figures = list((pathlib.Path(__file__).resolve().parents[1] / "docs").rglob("*.json"))
    assert figures
    files += [*figures, *(path.with_suffix(".md") for path in figures)]
    for path in sorted(files):
        found = machine.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found}"


# What loading and serving need not have.


def test_loading_and_serving_need_no_flax_optax_or_orbax(tmp_path):
    """In a process that has none of them; `import lepton_xla` needs not even JAX."""
    program = lx.trace(lambda w, x: x @ w, jnp.eye(2), {"x": lx.TensorSpec(("batch", 2), "float32")})
    lx.compile(program, {"batch": (1,)}).save(tmp_path / "model.lepton")
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('flax', 'optax', 'orbax', 'grain', 'sklearn'))\n"
        "import lepton_xla as lx, lepton_xla.serve.server, lepton_xla.cli.serve\n"
        "assert 'jax' not in sys.modules\n"
        "print(lx.load('model.lepton')(x=[[1.0, 2.0]])['output'].tolist())\n"
        "assert callable(lx.compile) and callable(lx.optimize)\n"
        "for what in (lambda: lx.train, lambda: lx.from_nnx(object(), {})):\n"
        "    try:\n"
        "        what()\n"
        "    except lx.MissingPackageError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "[[1.0, 2.0]]",
        "lx.train needs the package orbax: pip install 'lepton-xla[train]'",
        "a Flax module needs the package flax: pip install 'lepton-xla[flax]'",
    ], done.stderr


def test_a_module_of_this_package_that_is_missing_is_a_bug_and_not_an_extra():
    with pytest.raises(ModuleNotFoundError, match="no_such_part"), Needs("train", "lx.train"):
        importlib.import_module("lepton_xla.no_such_part")
    with pytest.raises(lx.MissingPackageError) as caught, Needs("train", "lx.train"):
        importlib.import_module("no_such_package.inside")
    assert isinstance(caught.value, ImportError)
    assert str(caught.value) == "lx.train needs the package no_such_package: pip install 'lepton-xla[train]'"
    with pytest.raises(lx.MissingPackageError) as caught, Needs("plot", "--plot"):
        from json import no_such_name  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]
    assert str(caught.value).startswith("--plot needs the package json: pip install 'lepton-xla[plot]' (cannot import")
    with pytest.raises(lx.MissingPackageError, match=r"be imported: .* \(no libGL\)"), Needs("plot", "--plot"):
        raise ImportError("no libGL")
