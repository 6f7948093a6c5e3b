"""Passes: function in, function out, each a rule table on the one walker in `rewrite`."""

from lepton_xla.passes.autotune import autotune
from lepton_xla.passes.awq import awq
from lepton_xla.passes.bias_correction import correct_bias
from lepton_xla.passes.calibrate import calibrate
from lepton_xla.passes.cast import cast
from lepton_xla.passes.cost import cost
from lepton_xla.passes.equalize import equalize
from lepton_xla.passes.fake_quant import fake_quant, initial_scales
from lepton_xla.passes.fold import fold
from lepton_xla.passes.gptq import gptq
from lepton_xla.passes.grid import round_to_nearest
from lepton_xla.passes.groups import find_groups
from lepton_xla.passes.importance import importance_scores
from lepton_xla.passes.inventory import weights_report
from lepton_xla.passes.lower import lower
from lepton_xla.passes.precompute import precompute
from lepton_xla.passes.prune import magnitude_masks, masked, prune
from lepton_xla.passes.rewrite import rewrite
from lepton_xla.passes.shrink import shrink
from lepton_xla.passes.sites import find_sites, rewrite_sites
from lepton_xla.passes.smoothquant import smooth
from lepton_xla.passes.sparsegpt import sparsegpt
from lepton_xla.passes.wanda import wanda

__all__ = [
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
    "lower",
    "magnitude_masks",
    "masked",
    "precompute",
    "prune",
    "rewrite",
    "rewrite_sites",
    "round_to_nearest",
    "shrink",
    "smooth",
    "sparsegpt",
    "wanda",
    "weights_report",
]
