"""Wanda: prunes, for each output, the weights with the smallest product of magnitude and input norm.

Sun et al. 2023, arXiv:2306.11695. Needs one pass over calibration data; remaining weights are not changed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.precomputation import for_plan
from lepton_xla.passes.core.sites import Site
from lepton_xla.passes.core.statistics import Statistics, collect_statistics, pooled
from lepton_xla.passes.pruning.held import earlier_masks, held_last, held_matrices
from lepton_xla.passes.pruning.magnitude import held_weights, pruned_targets, with_masks
from lepton_xla.passes.pruning.masks import group_masks
from lepton_xla.passes.pruning.ranking import Ranking, keep_largest_on_host
from lepton_xla.passes.pruning.shares import rule_shares
from lepton_xla.passes.pruning.targets import Target
from lepton_xla.program import Program
from lepton_xla.recipe.patterns import Pattern

UNSEEN = "by magnitude where the calibration data does not reach it"


def wanda_mask(
    weight: jax.Array, mean_square: jax.Array, pattern: Pattern, sparsity: float, kept: jax.Array | None = None
) -> jax.Array:
    """The mask of one weight, on the host.

    Args:
        weight: `[..., K, N]`.
        mean_square: mean square of each input, `[..., K]`; if all are zero, magnitudes decide.
        pattern: `unstructured`, over the K weights of each output, or N:M.
        sparsity: share to prune.
        kept: bool, shaped like the weight, False where an earlier mask holds it at zero; these are pruned first.

    Returns:
        bool `[..., K, N]`; each column loses the same number, unless more of it is held.
    """
    if pattern.kind == "n_m":
        return _group_mask(weight, mean_square, kept, pattern, sparsity)
    columns = _columns(weight, mean_square, kept)
    dropped = round(sparsity * columns.shape[-1])
    ((mask,),) = keep_largest_on_host([Ranking([columns], dropped, columns.ndim - 1)])
    return _back(mask, kept)


@functools.partial(jax.jit, static_argnames=("pattern", "sparsity"))
def _group_mask(
    weight: jax.Array, mean_square: jax.Array, kept: jax.Array | None, pattern: Pattern, sparsity: float
) -> jax.Array:
    mask = group_masks(_scores(weight, mean_square, kept), pattern, sparsity)
    return mask if kept is None else mask & kept


@jax.jit
def _columns(weight: jax.Array, mean_square: jax.Array, kept: jax.Array | None) -> jax.Array:
    """What each element is worth, `[..., N, K]`."""
    return jnp.swapaxes(_scores(weight, mean_square, kept), -1, -2)


@jax.jit
def _back(mask: jax.Array, kept: jax.Array | None) -> jax.Array:
    """A mask `[..., N, K]` as `[..., K, N]`, without what is held at zero."""
    mask = jnp.swapaxes(mask, -1, -2)
    return mask if kept is None else mask & kept


def _scores(weight: jax.Array, mean_square: jax.Array, kept: jax.Array | None) -> jax.Array:
    seen = jnp.any(mean_square > 0, axis=-1, keepdims=True)
    norms = jnp.where(seen, jnp.sqrt(mean_square), jnp.ones_like(mean_square))
    return held_last(jnp.abs(weight.astype(jnp.float32)) * norms[..., None], kept)


@takes(program=Program, plan=Plan)
def wanda(program: Program, plan: Plan, batches: Iterable[Mapping[str, Any]]) -> Program:
    """Prune the weights for which the plan has `method = "wanda"`.

    Args:
        program: the float program that the plan was made for.
        plan: the weights, their sparsity, and the pattern (unstructured or N:M).
        batches: input dicts, such as `{"image": array}`; at least one.

    Returns:
        The program with pruned weights and their masks.

    Raises:
        CalibrationError: as `collect_statistics`.
        RecipeError, ModelError: as `prune`.

    >>> inputs = {"x": lx.TensorSpec(("batch", 2), "float32")}
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.ones((2, 1))}, inputs)
    >>> rule = lx.train.PruneRule(sites=".*", sparsity=0.5, method="wanda")
    >>> plan = lx.passes.resolve(lx.Recipe(prune=(rule,)), program)
    >>> lx.passes.wanda(program, plan, [{"x": np.float32([[1, 9]])}]).weights["w"].tolist()
    [[0.0], [1.0]]
    """
    program = for_plan(program, plan)
    start = time.perf_counter()
    targets = pruned_targets(program, plan, lambda method: method == "wanda")
    met = products(plan, targets)
    found = collect_statistics(program, [site for sites in met.values() for site in sites], batches)
    shares, weights = rule_shares(targets), held_weights(program, targets)
    earlier = earlier_masks(targets, program.masks)
    masks: dict[str, jax.Array] = {}
    reasons: dict[str, str] = {}
    for target in targets:
        seen = [found[site.name] for site in met[target.path]]
        weight = target.matrices(weights[target.path])
        kept = held_matrices(target, earlier[target.path]) if earlier is not None else None
        mask = wanda_mask(weight, pooled(seen, "mean_square"), target.pattern, float(shares[target.path]), kept)
        masks[target.path] = target.stored(mask)
        reasons[target.path] = unseen(seen)
    return with_masks(program, plan, "wanda", start, targets, masks, reasons=reasons)


def products(plan: Plan, targets: Sequence[Target]) -> dict[str, list[Site]]:
    """Path -> the products of each target."""
    sites: dict[str, list[Site]] = {target.path: [] for target in targets}
    for entry in plan.sites:
        if entry.prune is not None and entry.site.path in sites and entry.site.kind != "gather":
            sites[entry.site.path].append(entry.site)
    return sites


def unseen(statistics: Sequence[Statistics]) -> str:
    """A remark for a weight that the data did not reach; empty if it did."""
    reached = bool(np.all(np.sum([found.rows for found in statistics], axis=0) > 0))
    return "" if reached else UNSEEN
