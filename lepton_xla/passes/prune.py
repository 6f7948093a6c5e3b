"""Magnitude pruning: the smallest elements of a weight are held at zero (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.program import Program, leaf_bytes, name_leaves
from lepton_xla.report import PassReport, SiteReport

if TYPE_CHECKING:
    from lepton_xla.recipe import Plan, SitePlan


def magnitude_masks(weights: Sequence[jax.Array], sparsity: float) -> list[jax.Array]:
    """Masks of the elements to keep, ranked by magnitude over all the weights together.

    Runs on the host, on real arrays, in time linear in the number of elements.

    Args:
        weights: arrays of any shapes. NaN counts as largest, so that it stays visible.
        sparsity: share of all elements to drop, in [0, 1).

    Returns:
        A bool array for each weight; over all of them exactly `round(sparsity * elements)` are False, at the smallest
        magnitudes; of equal ones, those that come first.
    """
    # The bits of magnitudes are in the order of the magnitudes, with NaN as the largest.
    flat = np.concatenate([np.abs(np.asarray(weight, np.float32)).ravel() for weight in weights]).view(np.uint32)
    dropped = round(sparsity * flat.size)
    keep = np.ones(flat.size, bool)
    if dropped:
        threshold = np.partition(flat, dropped - 1)[dropped - 1]
        below = flat < threshold
        keep[below] = False
        keep[np.flatnonzero(flat == threshold)[: dropped - np.count_nonzero(below)]] = False
    ends = np.cumsum([weight.size for weight in weights])[:-1]
    return [jnp.asarray(part.reshape(weight.shape)) for part, weight in zip(np.split(keep, ends), weights, strict=True)]


def prune(program: Program, plan: Plan) -> Program:
    """Sets the smallest elements of each planned weight to zero.

    Args:
        program: a program whose planned weights are float arrays.
        plan: which sites, and how much of each. With `distribution = "uniform"` each weight, and each step of a
            weight stacked for a scan, loses the same share; with `"global"` all weights of one rule are ranked
            together.

    Returns:
        The program with pruned weights and their masks, so that training can go on with the zeros held.
    """
    start = time.perf_counter()
    # A weight used at several sites is pruned once; the plan has made sure that its sites agree.
    chosen: dict[str | None, SitePlan] = {}
    for planned in plan.sites:
        if planned.prune is not None:
            chosen.setdefault(planned.site.path, planned)
    weights, masks = dict(program.weights), dict(program.masks)
    for rule in plan.recipe.prune:
        paths = [path for path, planned in chosen.items() if planned.prune is rule and path is not None]
        if rule.distribution == "global" and paths:
            found = magnitude_masks([program.weights[path] for path in paths], rule.sparsity)
            masks |= dict(zip(paths, found, strict=True))
        else:
            for path in paths:
                masks[path] = _uniform_mask(program.weights[path], rule.sparsity, chosen[path].site.stacked)
    reports = []
    for planned in plan.sites:
        path = planned.site.path
        if path in chosen and path is not None:
            weights[path] = jnp.where(masks[path], weights[path], jnp.zeros_like(weights[path]))
            size = leaf_bytes(weights[path].shape, weights[path].dtype)
            share = 1 - float(np.mean(masks[path]))
            reports.append(SiteReport(planned.site.name, "pruned", "", size, size, {"sparsity": share}))
        elif planned.not_pruned:
            reports.append(SiteReport(planned.site.name, "kept", planned.not_pruned))
    report = PassReport("prune", time.perf_counter() - start, tuple(reports))
    return program.replace(weights=weights, masks=masks, history=(*program.history, report))


def _uniform_mask(weight: jax.Array, sparsity: float, stacked: int) -> jax.Array:
    """A mask with the same share dropped in each step of the leading `stacked` axes."""
    steps = weight.reshape((-1, *weight.shape[stacked:]))
    return jnp.stack([magnitude_masks([step], sparsity)[0] for step in steps]).reshape(weight.shape)


def masked(fn: Callable[..., Any], masks: Mapping[str, jax.Array]) -> Callable[..., Any]:
    """Holds pruned weights at zero while training.

    Args:
        fn: `fn(weights, *args)`, weights any pytree.
        masks: weight path -> bool array of the weight's shape; other weights pass as they are.

    Returns:
        A function like `fn` that uses each weight times its mask: a masked element has no effect and no gradient.
    """

    def run(weights: Any, *args: Any, **kwargs: Any) -> Any:
        held = [
            jnp.where(masks[name], leaf, jnp.zeros_like(leaf)) if name in masks else leaf
            for name, leaf in name_leaves(weights, prefix="weights").items()
        ]
        return fn(jax.tree.unflatten(jax.tree.structure(weights), held), *args, **kwargs)

    return run
