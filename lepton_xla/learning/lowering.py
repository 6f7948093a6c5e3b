"""From trained float weights to what is served: weights alone, by the recipe of the artifact whose code runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from lepton_xla.compiler import Servable, make_update
from lepton_xla.compiler.artifact import Artifact
from lepton_xla.errors import ArtifactError, LearningError, first_line
from lepton_xla.optimization.pipeline import apply_plan, plan_for
from lepton_xla.program import Program
from lepton_xla.recipe import Recipe


def lower(program: Program, base: Servable, batches: Sequence[Mapping[str, np.ndarray]], version: str) -> Artifact:
    """Make an artifact of weights alone of a trained program, for the compiled code of another artifact.

    The recipe that is stored in that one is applied again. What it measured is in the cache of this machine, so the
    same products run in integers; a recipe with `measure = false` gives the same on any machine.

    Args:
        program: trained, in float.
        base: the loaded artifact.
        batches: inputs to calibrate with, if the recipe needs some.
        version: of the artifact.

    Raises:
        LearningError: if the result does not fit the artifact.
    """
    stored: Any = base.manifest.recipe
    recipe = Recipe(name="none", fold=False) if stored is None else msgspec.convert(stored, Recipe)
    buckets = {name: sizes for name, sizes in base.manifest.buckets.items() if name in program.symbols}
    planned, plan = plan_for(program, recipe, calibration=batches, buckets=buckets)
    lowered = apply_plan(planned, plan, calibration=batches, buckets=buckets)
    try:
        return make_update(base, lowered, version=version)
    except ArtifactError as error:
        raise LearningError(
            f"what was trained does not fit the artifact that serves ({first_line(error)}): give the one that was "
            "compiled from this model, on this machine or with measure = false in its recipe"
        ) from error
