"""Magnitude pruning: the smallest elements of a weight are held at zero (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lepton_xla.program import Program, leaf_bytes, name_leaves
from lepton_xla.report import PassReport, SiteReport

if TYPE_CHECKING:
    from lepton_xla.recipe import Plan


def magnitude_mask(weight: jax.Array, sparsity: float) -> jax.Array:
    """Mask of the elements to keep.

    Args:
        weight: any shape. NaN counts as largest, so that it stays visible.
        sparsity: share of elements to drop, in [0, 1).

    Returns:
        bool of the weight's shape with exactly `round(sparsity * size)` False, at the smallest magnitudes; of equal
        ones, those that come first in row-major order.
    """
    order = jnp.argsort(jnp.abs(weight).ravel(), stable=True)
    dropped = round(sparsity * weight.size)
    return jnp.ones(weight.size, bool).at[order[:dropped]].set(False).reshape(weight.shape)


def prune(program: Program, plan: Plan) -> Program:
    """Sets the smallest elements of each planned weight to zero.

    Args:
        program: a program whose planned weights are float arrays.
        plan: which sites, and how much of each. A weight stacked for a scan is pruned step by step.

    Returns:
        The program with pruned weights and their masks, so that training can go on with the zeros held.
    """
    start = time.perf_counter()
    weights, masks, reports = dict(program.weights), dict(program.masks), []
    for planned in plan.sites:
        path = planned.site.path
        if planned.prune is None or path is None:
            if planned.kept.startswith("not pruned"):
                reports.append(SiteReport(planned.site.name, "kept", planned.kept))
            continue
        if path in masks and masks[path] is not program.masks.get(path):
            continue  # the weight's second site
        weight = weights[path]
        step_mask = lambda step, sparsity=planned.prune.sparsity: magnitude_mask(step, sparsity)  # noqa: E731
        mask = step_mask
        for _ in range(planned.site.stacked):
            mask = jax.vmap(mask)
        masks[path] = mask(weight)
        weights[path] = jnp.where(masks[path], weight, jnp.zeros_like(weight))
        size = leaf_bytes(weight.shape, weight.dtype)
        zeros = 1 - float(jnp.mean(masks[path], dtype=jnp.float32))
        reports.append(SiteReport(planned.site.name, "pruned", "", size, size, {"sparsity": zeros}))
    report = PassReport("prune", time.perf_counter() - start, tuple(reports))
    return program.replace(weights=weights, masks=masks, history=(*program.history, report))


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
