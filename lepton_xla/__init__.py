"""Make a trained JAX model small and fast, compile it ahead of time, and serve it, without leaving JAX."""

import importlib
from typing import TYPE_CHECKING

from lepton_xla.deferred import exports

if TYPE_CHECKING:
    from lepton_xla import data, evaluation, explanation, federated, launch, passes, sharding, train, trust, tuning
    from lepton_xla.adapters import Generator, from_linen, from_nnx
    from lepton_xla.compiler import Servable, compile, encrypt, load, sign, verify
    from lepton_xla.errors import (
        ArtifactError,
        CalibrationError,
        CheckpointError,
        CompileError,
        ExecutionError,
        FederatedError,
        InputError,
        LaunchError,
        LearningError,
        LeptonError,
        MissingPackageError,
        ModelError,
        RecipeError,
        RepositoryError,
        SampleError,
        ServeError,
        ShardingError,
        TrainingError,
        TrustError,
        TuningError,
        UnsupportedError,
    )
    from lepton_xla.exporting import export
    from lepton_xla.modelspec import ModelSpec
    from lepton_xla.optimization.pipeline import optimize
    from lepton_xla.passes.core.plans import Plan
    from lepton_xla.passes.core.sites import find_sites
    from lepton_xla.program import Program, TensorSpec, trace
    from lepton_xla.raw_inputs import give_labels, take_categories, take_images, take_texts
    from lepton_xla.recipe import Recipe
    from lepton_xla.report import PassReport, SiteReport

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CheckpointError",
    "CompileError",
    "ExecutionError",
    "FederatedError",
    "Generator",
    "InputError",
    "LaunchError",
    "LearningError",
    "LeptonError",
    "MissingPackageError",
    "ModelError",
    "ModelSpec",
    "PassReport",
    "Plan",
    "Program",
    "Recipe",
    "RecipeError",
    "RepositoryError",
    "SampleError",
    "Servable",
    "ServeError",
    "ShardingError",
    "SiteReport",
    "TensorSpec",
    "TrainingError",
    "TrustError",
    "TuningError",
    "UnsupportedError",
    "compile",
    "data",
    "encrypt",
    "evaluation",
    "explanation",
    "export",
    "federated",
    "find_sites",
    "from_linen",
    "from_nnx",
    "give_labels",
    "launch",
    "load",
    "optimize",
    "passes",
    "sharding",
    "sign",
    "take_categories",
    "take_images",
    "take_texts",
    "trace",
    "train",
    "trust",
    "tuning",
    "verify",
]

# The module of each public name. Names are imported on first use, so that `leptonx --help` does not import JAX. No name
# may equal a module of this package, because importing that module would replace it.
_HOMES = {
    "compiler": ("Servable", "compile", "encrypt", "load", "sign", "verify"),
    "errors": (
        "ArtifactError",
        "CalibrationError",
        "CheckpointError",
        "CompileError",
        "ExecutionError",
        "FederatedError",
        "InputError",
        "LaunchError",
        "LearningError",
        "LeptonError",
        "MissingPackageError",
        "ModelError",
        "RecipeError",
        "RepositoryError",
        "SampleError",
        "ServeError",
        "ShardingError",
        "TrainingError",
        "TrustError",
        "TuningError",
        "UnsupportedError",
    ),
    "exporting": ("export",),
    "modelspec": ("ModelSpec",),
    "passes.core.sites": ("find_sites",),
    "optimization.pipeline": ("optimize",),
    "adapters": ("Generator", "from_linen", "from_nnx"),
    "program": ("Program", "TensorSpec", "trace"),
    "passes.core.plans": ("Plan",),
    "raw_inputs": ("give_labels", "take_categories", "take_images", "take_texts"),
    "recipe": ("Recipe",),
    "report": ("PassReport", "SiteReport"),
}

_PACKAGES = {
    "data", "evaluation", "explanation", "federated", "launch", "passes", "sharding", "train", "trust", "tuning",
}  # fmt: skip

if not TYPE_CHECKING:  # otherwise a type checker would accept every misspelled name
    _get, __dir__ = exports(__name__, _HOMES)

    def __getattr__(name: str) -> object:
        if name in _PACKAGES:
            return importlib.import_module(f"lepton_xla.{name}")
        return _get(name)
