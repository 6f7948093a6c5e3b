"""Models for `leptonx eval`: float models, recipes applied to them, artifacts, and models on servers."""

from __future__ import annotations

import contextlib
import dataclasses
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.cli import _arrays, _common, _models
from lepton_xla.compiler import Servable, load
from lepton_xla.compiler.golden import LABEL
from lepton_xla.compiler.weights import stored_bytes
from lepton_xla.errors import InputError
from lepton_xla.modelspec import ModelSpec, Predict
from lepton_xla.optimization.pipeline import optimize
from lepton_xla.program import Program
from lepton_xla.trees import name_leaves
from lepton_xla.tuning.trials import as_loaded, predictor


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model to evaluate.

    Attributes:
        name: what it was called on the command line.
        kind: `program`, `recipe`, `artifact` or `server`.
        predict: runs it.
        resources: bytes of its weights.
        route: how an artifact was loaded.
    """

    name: str
    kind: str
    predict: Predict
    resources: dict[str, float]
    route: str = ""


@dataclasses.dataclass(frozen=True)
class Contestants:
    """All models, and the ModelSpec among them.

    Attributes:
        models: in the order of the command line, recipes last.
        spec: the first ModelSpec; None if there is none.
        target: its name on the command line.
    """

    models: Sequence[Contestant]
    spec: ModelSpec | None
    target: str

    def judged(self, step: _common.Step) -> dict[str, dict[str, float]]:
        """Name of a model -> its metrics by the ModelSpec's evaluate, none without one; no models without a ModelSpec.

        Raises:
            ModelError: if evaluate fails.
        """
        if self.spec is None:
            return {}
        found: dict[str, dict[str, float]] = {}
        for each in self.models:
            if self.spec.evaluate is not None:
                step(f"evaluate {each.name}")
            found[each.name] = _models.evaluate(self.spec, each.predict)
        return found


def load_all(
    names: Sequence[str], recipes: Sequence[str], stack: contextlib.ExitStack, step: _common.Step
) -> Contestants:
    """Load every model.

    Raises:
        InputError: if a name occurs twice, or a recipe has no model.
        LeptonError: if one cannot be loaded.
    """
    if twice := [name for k, name in enumerate([*names, *recipes]) if name in [*names, *recipes][:k]]:
        raise InputError(f"{twice[0]} is given twice")
    specs: dict[str, tuple[ModelSpec, Program]] = {}
    others: dict[str, Servable | str] = {}
    for name in names:
        step(f"load {name}")
        if name.startswith(("http://", "https://", "http+unix://")):
            others[name] = name
        elif ":" in name and "://" not in name:
            spec = _models.load_target(name)
            specs[name] = spec, spec.program()
        else:
            others[name] = load(name)
    target = next(iter(specs), "")
    spec, program = specs[target] if target else (None, None)
    if recipes and (spec is None or program is None):
        raise InputError("--recipe needs a float model: FILE.py:NAME")

    made: list[Contestant] = []
    for name in names:
        if name in specs:
            own = specs[name][1]
            sizes = {"weights_bytes": float(own.weights_bytes)}
            made.append(Contestant(name, "program", _models.float_predict(own), sizes))
            continue
        found = others[name]
        if isinstance(found, Servable):
            if program is not None:
                _models.check_same_inputs(found, program, name, target)
            sizes = {
                "weights_bytes": float(found.weights_bytes),
                "weights_on_disk": float(_common.weights_on_disk(found.manifest)),
            }
            made.append(Contestant(name, "artifact", found, sizes, found.route))
        else:
            made.append(Contestant(name, "server", _client(name, stack), {}))
    for recipe in recipes:
        assert spec is not None
        assert program is not None
        step(f"optimize by {recipe}")
        made.append(_optimized(recipe, spec, program))
    return Contestants(made, spec, target)


def _optimized(name: str, spec: ModelSpec, program: Program) -> Contestant:
    batches, _ = _models.calibration(spec, program)
    small = optimize(
        program,
        _models.load_recipe(name),
        calibration=batches,
        buckets=_models.bucket_sizes(spec, program, {}),
    )
    loaded = as_loaded(small)
    sizes = {
        "weights_bytes": float(loaded.weights_bytes),
        "weights_on_disk": float(stored_bytes(name_leaves(small.weights))),
    }
    return Contestant(name, "recipe", predictor(loaded), sizes)


def _client(url: str, stack: contextlib.ExitStack) -> Predict:
    from lepton_xla.serve.client import Client

    parts = urllib.parse.urlsplit(url)
    model = parts.path.strip("/").removeprefix("v2/models/")
    if not model or "/" in model:
        raise InputError(f"{url}: expected the address of a server and a model, such as http://127.0.0.1:8000/digits")
    client = stack.enter_context(Client(f"{parts.scheme}://{parts.netloc}"))

    def predict(**inputs: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(each) for name, each in client.infer(model, **inputs).items()}

    return predict


def rows_of(made: Contestants, file: str | None) -> tuple[Mapping[str, np.ndarray], np.ndarray] | None:
    """Labelled rows: those of the file, else those of the ModelSpec; None if there are none.

    Raises:
        InputError: if they lack `label`.
    """
    if file is not None:
        found, where = _arrays.read_golden(file), file
    elif made.spec is not None and made.spec.rows is not None:
        found, where = made.spec.labelled_rows(), f"rows of {made.target}"
    else:
        return None
    assert found is not None
    if LABEL not in found:
        raise InputError(f"{where}: there is no array {LABEL!r}, the class of each row; it has {', '.join(found)}")
    return {name: np.asarray(each) for name, each in found.items() if name != LABEL}, np.asarray(found[LABEL])
