"""Docstrings: their examples run, and every public name has one."""

import ast
import doctest
import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sources import TREES

import lepton_xla as lx
from lepton_xla.serve import Options, Server

# What an example need not import, as CONTRIBUTING.md says; beside it, the names of its own module.
AT_HAND = {"jax": jax, "jnp": jnp, "np": np, "lx": lx}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

PUBLIC = [
    "lepton_xla",
    "lepton_xla.adapters",
    "lepton_xla.compiler",
    "lepton_xla.data",
    "lepton_xla.evaluation",
    "lepton_xla.explanation",
    "lepton_xla.exporting",
    "lepton_xla.federated",
    "lepton_xla.launch",
    "lepton_xla.learning",
    "lepton_xla.optimization",
    "lepton_xla.passes",
    "lepton_xla.quant",
    "lepton_xla.recipe",
    "lepton_xla.serve",
    "lepton_xla.serve.client",
    "lepton_xla.sharding",
    "lepton_xla.train",
    "lepton_xla.train.compression",
    "lepton_xla.train.distillation",
    "lepton_xla.trust",
    "lepton_xla.tuning",
]


def texts(module):
    """Docstrings of a module and of all in it, those under a constant included: (line, text)."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


WITH_EXAMPLES = [module for module in TREES if any(">>> " in text for _, text in texts(module))]


class Double:
    """A servable: y = 2 x."""

    name = "double"
    version = "1"

    def __init__(self):
        self.inputs = {"x": lx.TensorSpec(("batch", 2), "float32")}
        self.outputs = {"y": lx.TensorSpec(("batch", 2), "float32")}
        self.buckets = {"batch": (1, 4)}

    def run(self, sizes, arrays):
        return [2 * arrays[0]]


@pytest.fixture(scope="module")
def url():
    """Where examples of a client find the model `double`."""
    with Server(Double(), Options(port=0)) as server:
        yield server.url


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_run(module, tmp_path, monkeypatch, request):
    names = {**vars(importlib.import_module(module)), **AT_HAND}
    if module.startswith("lepton_xla.serve.client"):
        names["url"] = request.getfixturevalue("url")
    runner, said = doctest.DocTestRunner(verbose=False, optionflags=FLAGS), []
    for line, text in texts(module):
        folder = tmp_path / str(line)  # examples may write files
        folder.mkdir()
        monkeypatch.chdir(folder)
        test = doctest.DocTestParser().get_doctest(text, dict(names), module, f"{module}, docstring at", line)
        runner.run(test, out=said.append)
    assert not said, "".join(said)
    assert runner.summarize(verbose=False).attempted


def test_an_example_that_is_wrong_is_seen():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", "", 0)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None).failed == 1


def without_example(name, item):
    """What of a public name no example shows: the name itself, or methods that no example of it or its class calls."""
    text = item.__doc__ or ""
    missing = [] if ">>> " in text else [name]
    if inspect.isclass(item):
        members = {
            name: value.__doc__ or ""
            for kind in item.__mro__
            if ours(kind)
            for name, value in vars(kind).items()
            if not name.startswith("_") and (inspect.isroutine(value) or isinstance(value, property))
        }
        shown = "".join(source(part) for part in (text, *members.values()))
        for method, own in members.items():
            referred = own.startswith("See `")  # to the method of another class that does the same
            if ">>> " not in own and not referred and not re.search(rf"\b{method}\b", shown):
                missing.append(f"{name}.{method}")
    return missing


def source(text):
    """The code of the examples in a docstring."""
    return "".join(example.source for example in doctest.DocTestParser().get_examples(text))


def ours(kind):
    return kind.__module__.startswith("lepton_xla")


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_an_example(module):
    package = importlib.import_module(module)
    items = {name: getattr(package, name) for name in package.__all__}
    items = {name: item for name, item in items.items() if callable(item)}  # no constants, no packages
    missing = [text for name, item in items.items() for text in without_example(name, item)]
    assert not missing, f"without an example in their docstring: {', '.join(missing)}"


def test_what_lacks_an_example_is_named():
    class Shown:
        """A class.

        >>> Shown().first()
        """

        def first(self): ...
        def second(self): ...

    Shown.__module__ = "lepton_xla.shown"
    assert without_example("Shown", Shown) == ["Shown.second"]
    assert without_example("f", lambda: None) == ["f"]
