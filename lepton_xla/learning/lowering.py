"""From trained float weights to what is served: weights alone, by the recipe of the artifact whose code runs them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from lepton_xla.compiler import Servable, make_update, requantize
from lepton_xla.compiler.artifact import Artifact
from lepton_xla.errors import ArtifactError, LearningError, first_line
from lepton_xla.optimization.pipeline import apply_plan, plan_for
from lepton_xla.program import Program
from lepton_xla.recipe import Recipe


def lower(
    program: Program,
    path: str | os.PathLike[str],
    base: Servable,
    batches: Sequence[Mapping[str, np.ndarray]],
    version: str,
) -> Artifact:
    """Make an artifact of weights alone of a trained program, for the compiled code of another artifact.

    If that keeps its float master (`leptonx compile --keep-master`), the steps that made its weights small are taken
    again, without tracing or compiling; codes that were chosen for calibration data are rounded to nearest. Otherwise
    the recipe that is stored in it is applied again. What it measured is in the cache of this machine, so the same
    products run in integers; a recipe with `measure = false` gives the same on any machine.

    Args:
        program: trained, in float.
        path: where the artifact is.
        base: the artifact, loaded.
        batches: inputs to calibrate with, if the recipe needs some.
        version: of the artifact.

    Raises:
        LearningError: if the result does not fit the artifact.
    """
    try:
        if base.manifest.master is not None:
            paths = [tensor.name for tensor in base.manifest.master.weights]
            weights = {name: program.weights[name] for name in paths if name in program.weights}
            return requantize(path, weights, version=version, nearest=True)
        return make_update(base, _optimized(program, base, batches), version=version)
    except ArtifactError as error:
        raise LearningError(
            f"what was trained does not fit the artifact that serves ({first_line(error)}): give the one that was "
            "compiled from this model, with --keep-master, or on this machine, or with measure = false in its recipe"
        ) from error


def _optimized(program: Program, base: Servable, batches: Sequence[Mapping[str, np.ndarray]]) -> Program:
    """The program, by the recipe that the artifact was made with."""
    stored: Any = base.manifest.recipe
    recipe = Recipe(name="none", fold=False) if stored is None else msgspec.convert(stored, Recipe)
    buckets = {name: sizes for name, sizes in base.manifest.buckets.items() if name in program.symbols}
    planned, plan = plan_for(program, recipe, calibration=batches, buckets=buckets)
    return apply_plan(planned, plan, calibration=batches, buckets=buckets)
