"""Passes: function transforms. Each is a table of rules for the walker behind `rewrite`."""

import warnings
from typing import Any

from lepton_xla.passes.alternatives.autotuning import autotune
from lepton_xla.passes.core.calibration import calibrate
from lepton_xla.passes.core.costs import cost
from lepton_xla.passes.core.inventory import weights_report
from lepton_xla.passes.core.precomputation import precompute
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.sites import find_sites, rewrite_sites
from lepton_xla.passes.core.targets import Target
from lepton_xla.passes.core.timing import Timer
from lepton_xla.passes.folding.norms import fold
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.pruning.magnitude import magnitude_masks, masked, prune
from lepton_xla.passes.pruning.sparsegpt import sparsegpt
from lepton_xla.passes.pruning.wanda import wanda
from lepton_xla.passes.quantization.bias_correction import correct_bias
from lepton_xla.passes.quantization.casting import cast
from lepton_xla.passes.quantization.fake_quantization import fake_quant, initial_scales
from lepton_xla.passes.quantization.gptq import gptq
from lepton_xla.passes.quantization.integer_arithmetic import quantize
from lepton_xla.passes.quantization.rounding import round_to_nearest
from lepton_xla.passes.rescaling.awq import awq
from lepton_xla.passes.rescaling.equalization import equalize
from lepton_xla.passes.rescaling.smoothquant import smooth
from lepton_xla.passes.shrinking.groups import find_groups
from lepton_xla.passes.shrinking.importance import importance_scores
from lepton_xla.passes.shrinking.removal import shrink

__all__ = [
    "Target",
    "Timer",
    "autotune",
    "awq",
    "calibrate",
    "cast",
    "correct_bias",
    "cost",
    "equalize",
    "fake_quant",
    "find_groups",
    "find_sites",
    "fold",
    "gptq",
    "importance_scores",
    "initial_scales",
    "magnitude_masks",
    "masked",
    "precompute",
    "prune",
    "quantize",
    "resolve",
    "rewrite",
    "rewrite_sites",
    "round_to_nearest",
    "shrink",
    "smooth",
    "sparsegpt",
    "wanda",
    "weights_report",
]


def __getattr__(name: str) -> Any:
    if name == "lower":  # deprecated in 0.1
        warnings.warn("lepton_xla.passes.lower is now called quantize", DeprecationWarning, stacklevel=2)
        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
