"""Resolves a recipe against a program: what each site gets, or why it gets nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import msgspec

from lepton_xla.arguments import takes
from lepton_xla.errors import RecipeError, UnsupportedError
from lepton_xla.passes.core.expressions import stored_shape
from lepton_xla.passes.core.matrix import contracted_size
from lepton_xla.passes.core.plans import Plan, SitePlan, by_weight
from lepton_xla.passes.core.sites import Site, find_sites
from lepton_xla.passes.pruning.eligibility import other_matrix, unprunable
from lepton_xla.passes.pruning.shares import something_left
from lepton_xla.passes.pruning.targets import plan_targets
from lepton_xla.passes.quantization.eligibility import not_float, unstorable, unsupported
from lepton_xla.program import Program
from lepton_xla.quant.grid import nearest_group
from lepton_xla.recipe import PruneRule, QuantizeRule, Recipe
from lepton_xla.recipe.rules import Rule
from lepton_xla.trees import leaf_bytes, name_leaves, some_names


@takes(recipe=Recipe, program=Program)
def resolve(recipe: Recipe, program: Program, *, sites: Sequence[Site] | None = None) -> Plan:
    """Decide what a recipe does to each site of a program.

    Args:
        recipe: the recipe.
        program: the program.
        sites: its sites, if the caller has found them already.

    Raises:
        RecipeError: if a value is invalid, a pattern matches no site, earlier blocks leave a block without sites, two
            rules would treat a weight differently, or a weight would be pruned entirely (as far as shapes determine
            that).
        UnsupportedError: if a rule matches a site that a pass cannot handle and `on_unsupported` is `error`.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> print(lx.passes.resolve(lx.Recipe.load("int8"), program))
    recipe int8: 1 sites
      w  dot_general  int8 weights, int8 activations dynamic
    """
    recipe.check()
    found = tuple(sites) if sites is not None else find_sites(program)
    for kind, rules in (("prune", recipe.prune), ("quantize", recipe.quantize)):
        if found or recipe.on_unsupported == "error":
            _check_used(rules, found, f"recipe {recipe.name!r}: {kind}")
    stored = name_leaves(program.weights)
    stored |= {
        site.path: stored_shape(site.source, program.weights)
        for site in found
        if site.path is not None and site.source is not None
    }
    lookups = [rule for rule in recipe.prune if _names_lookups(rule, found)]
    decided = _share([_decide(recipe, site, stored, lookups) for site in found], recipe.name)
    decided = [_with_own_group(entry) for entry in decided]
    for entry in decided:
        if entry.kept and recipe.on_unsupported == "error":
            raise UnsupportedError(
                f"recipe {recipe.name!r}: site {entry.site.name!r} ({entry.site.kind}): {entry.kept}. Exclude the "
                f"site, or set on_unsupported = 'keep'"
            )
    plan = Plan(recipe, tuple(decided))
    empty = something_left(plan_targets(plan, stored), keep=recipe.on_unsupported == "keep")
    return dataclasses.replace(plan, sites=tuple(entry.without_pruning(empty) for entry in plan.sites))


def _decide(recipe: Recipe, site: Site, stored: Mapping[str, Any], lookups: Sequence[PruneRule]) -> SitePlan:
    prune = next((rule for rule in recipe.prune if rule.matches(site.name)), None)
    quantize = next((rule for rule in recipe.quantize if rule.matches(site.name)), None)
    if quantize is not None and site.kind == "gather":  # a lookup table is not multiplied
        quantize = msgspec.structs.replace(quantize, activations="none")
    if quantize is not None and site.path is None and quantize.activations != "none":  # both operands are activations
        both = quantize.activations
        quantize = msgspec.structs.replace(quantize, weights=both, granularity="channel", dynamic=True)
    leaf = stored.get(site.path) if site.path is not None else None
    return SitePlan(
        site,
        prune,
        quantize,
        not_pruned=unprunable(prune, site, leaf, named=prune in lookups) if prune is not None else "",
        not_quantized=_unquantizable(site, quantize, leaf) if quantize is not None else "",
        weight_bytes=leaf_bytes(leaf.shape, leaf.dtype) if leaf is not None else 0,
    )


def _check_used(rules: Sequence[Rule], sites: Sequence[Site], where: str) -> None:
    """Refuse patterns that match nothing, and blocks whose sites are all taken by earlier blocks."""
    have = f"the program's {len(sites)} sites: {some_names([site.name for site in sites])}"
    left = list(sites)
    for index, rule in enumerate(rules):
        if not any(re.fullmatch(rule.sites, site.name) for site in sites):
            raise RecipeError(f"{where}[{index}].sites = {rule.sites!r} matches none of {have}")
        for pattern in rule.exclusions:
            if not any(re.fullmatch(pattern, site.name) for site in sites):
                raise RecipeError(f"{where}[{index}].exclude = {pattern!r} matches none of {have}")
        if not any(rule.matches(site.name) for site in sites):
            raise RecipeError(f"{where}[{index}].exclude = {rule.exclude!r} excludes everything that its sites match")
        if not any(rule.matches(site.name) for site in left):
            raise RecipeError(
                f"{where}[{index}].sites = {rule.sites!r} only matches sites that earlier blocks take; the first block "
                f"that matches a site wins, so put it before them"
            )
        left = [site for site in left if not rule.matches(site.name)]


def _names_lookups(rule: PruneRule, sites: Sequence[Site]) -> bool:
    """Whether a rule is meant for embeddings: it matches embeddings only, and not everything."""
    return not re.fullmatch(rule.sites, "\0") and all(
        site.kind == "gather" for site in sites if rule.matches(site.name)
    )


def _share(planned: Sequence[SitePlan], recipe: str) -> list[SitePlan]:
    """Give all sites of a weight the same plan, because it is a single array."""
    groups = by_weight(planned)
    return [_with_group(entry, groups.get(entry.site.path or "", [entry]), recipe) for entry in planned]


def _with_group(entry: SitePlan, group: Sequence[SitePlan], recipe: str) -> SitePlan:
    first = group[0]
    if not _alike(first, entry):
        raise RecipeError(
            f"recipe {recipe!r}: sites {first.site.name!r} and {entry.site.name!r} use one weight but get different "
            f"treatment ({first.describe()}; {entry.describe()}); give both the same rule"
        )
    changes: dict[str, Any] = {}
    if entry.prune is not None:
        reason = entry.not_pruned or _because_of([(other, other.not_pruned) for other in group])
        reason = reason or other_matrix(entry.prune, [other.site for other in group])
        changes |= {"prune": None, "not_pruned": reason} if reason else {}
    if entry.quantize is not None:
        reason = entry.not_quantized or _because_of([(other, other.not_quantized) for other in group])
        if not reason and entry.site.path is not None:
            reason = unstorable([other.site for other in group])
        changes |= {"quantize": None, "not_quantized": reason} if reason else {}
    return dataclasses.replace(entry, **changes)


def _with_own_group(entry: SitePlan) -> SitePlan:
    """Replace `group:~G` by the `group:g` that fits the weight; all sites of a weight have the same matrix."""
    rule = entry.quantize
    if rule is None or "~" not in rule.granularity:
        return entry
    size = nearest_group(contracted_size(entry.site), int(rule.granularity.partition("~")[2]))
    return dataclasses.replace(entry, quantize=msgspec.structs.replace(rule, granularity=f"group:{size}"))


def _unquantizable(site: Site, rule: QuantizeRule, stored: Any) -> str:
    """Why a site's weight cannot be quantized; empty if it can."""
    if stored is not None and not jnp.issubdtype(stored.dtype, jnp.floating):
        return not_float(stored.dtype)
    return unsupported(site, rule) or ""


def _alike(first: SitePlan, second: SitePlan) -> bool:
    """Whether two sites treat their weight in the same way; lookups ignore activations."""
    rules = [first.quantize, second.quantize]
    if "gather" in (first.site.kind, second.site.kind):
        rules = [rule and msgspec.structs.replace(rule, activations="none") for rule in rules]
    return first.prune == second.prune and rules[0] == rules[1]


def _because_of(reasons: Sequence[tuple[SitePlan, str]]) -> str:
    """The first reason of another site of the same weight."""
    return next((f"its weight is shared with {other.site.name!r}: {why}" for other, why in reasons if why), "")
