"""Eligibility: which weights a rule can prune, and why not the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.layouts import LayoutOp, layout_key
from lepton_xla.passes.core.sites import Site
from lepton_xla.passes.pruning.targets import undivided
from lepton_xla.passes.quantization.eligibility import unsupported
from lepton_xla.recipe.patterns import Pattern
from lepton_xla.recipe.rules import DATA_METHODS, PruneRule


def unprunable(rule: PruneRule, site: Site, stored: Any, *, named: bool = False) -> str:
    """Why a rule cannot prune a site's weight; empty if it can.

    Args:
        rule: the rule.
        site: the site.
        stored: the weight in the program.
        named: whether the rule matches embeddings only; otherwise embeddings are skipped.
    """
    pattern = Pattern.parse(rule.pattern)
    if site.path is None:
        return "no weight"
    if site.kind == "gather" and not named:
        return "an embedding"
    if stored is None or not jnp.issubdtype(stored.dtype, jnp.floating):
        return f"its weight is {site.weight.dtype if stored is None else stored.dtype}"
    if not math.prod(stored.shape):
        return "its weight is empty"
    if pattern.kind == "unstructured" and rule.method not in DATA_METHODS:
        return "" if matrix.steps_lead(site) or not _resizes(site) else "its weight is cut before its stacked axes lead"
    if site.kind == "gather":
        return f"pattern = {rule.pattern!r} and method = {rule.method!r} are not for embeddings"
    if _compat.is_manual(site.eqn):
        return "it is inside shard_map, where the weight is one shard"
    if _resizes(site):
        return "its weight is broadcast or cut before use, so its matrix is not the whole of it"
    return unsupported(site) or undivided(pattern, site)


def other_matrix(rule: PruneRule, sites: Sequence[Site]) -> str:
    """Why sites of a weight cannot share a mask: it is a different matrix at one of them; empty if they can."""
    if rule.pattern == "unstructured" and rule.method not in DATA_METHODS:
        return ""
    keys = [(layout_key(site.layout), site.kind, str(site.params["dimension_numbers"])) for site in sites]
    differs = next((site for site, key in zip(sites, keys, strict=True) if key != keys[0]), None)
    return "" if differs is None else f"its weight is used in two layouts, at {sites[0].name!r} and {differs.name!r}"


def _resizes(site: Site) -> bool:
    return any(op.resizes for op in site.layout if isinstance(op, LayoutOp))
