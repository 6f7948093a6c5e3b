"""Make a trained JAX model small and fast, compile it ahead of time, and serve it, without leaving JAX."""

from lepton_xla import passes
from lepton_xla.compiler import Servable, compile, load, verify
from lepton_xla.errors import (
    ArtifactError,
    CalibrationError,
    CompileError,
    InputError,
    LeptonError,
    ModelError,
    RecipeError,
    ServeError,
    UnsupportedError,
)
from lepton_xla.modelspec import ModelSpec
from lepton_xla.optimize import optimize
from lepton_xla.passes.sites import find_sites
from lepton_xla.program import Program, TensorSpec, from_linen, from_nnx, trace
from lepton_xla.recipe import Plan, Recipe
from lepton_xla.report import PassReport, SiteReport

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CompileError",
    "InputError",
    "LeptonError",
    "ModelError",
    "ModelSpec",
    "PassReport",
    "Plan",
    "Program",
    "Recipe",
    "RecipeError",
    "Servable",
    "ServeError",
    "SiteReport",
    "TensorSpec",
    "UnsupportedError",
    "compile",
    "find_sites",
    "from_linen",
    "from_nnx",
    "load",
    "optimize",
    "passes",
    "trace",
    "verify",
]
