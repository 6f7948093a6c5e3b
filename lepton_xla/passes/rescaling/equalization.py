"""Cross-layer equalization: gives the channels between two products equal ranges in both weights.

Nagel et al. 2019, arXiv:1906.04721, section 4.1. If only positively homogeneous functions, such as relu, are between
two products, channel i of the first weight is divided by `s_i = sqrt(r1_i / r2_i)`, and that of the second multiplied
by it, where `r1`, `r2` are the ranges of both. Then both ranges are `sqrt(r1_i r2_i)`. Needs no data.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.derivations import Step
from lepton_xla.errors import RecipeError
from lepton_xla.passes.core.flow import Absorber
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.precomputation import for_plan
from lepton_xla.passes.core.sites import Site, find_sites
from lepton_xla.passes.quantization.rounding import weight_report
from lepton_xla.passes.rescaling.factors import FactorGroup, column_absmax, fitted, usable
from lepton_xla.passes.rescaling.scaling import scale_groups, scaled_weights, weight_absmax
from lepton_xla.program import Program
from lepton_xla.report import PassReport, unchanged


@takes(program=Program, plan=Plan)
def equalize(program: Program, plan: Plan, *, rounds: int = 20, tolerance: float = 1e-3) -> Program:
    """Equalize every pair of products of which the plan quantizes the second; the float function is unchanged.

    Pairs are found by data flow, in stacked layers within each step. Equalizing a pair changes the ranges of the next
    one, so all pairs are repeated until the factors converge.

    Args:
        program: the float program that the plan was made for.
        plan: the products to equalize are those that it quantizes.
        rounds: maximum number of rounds over all pairs.
        tolerance: stop after a round whose factors all differ from 1 by at most this.

    Raises:
        RecipeError: if `rounds` is not positive.

    >>> weights = {"a": jnp.diag(jnp.array([1.0, 100.0])), "b": jnp.eye(2)}
    >>> program = lx.trace(lambda w, x: x @ w["a"] @ w["b"], weights, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> even = lx.passes.equalize(program, lx.passes.resolve(lx.Recipe.load("int8"), program))
    >>> jnp.diag(even.weights["a"]).tolist(), jnp.diag(even.weights["b"]).tolist()
    ([1.0, 10.0], [1.0, 10.0])
    """
    program = for_plan(program, plan)
    start = time.perf_counter()
    if rounds < 1:
        raise RecipeError(f"equalization in {rounds} rounds does nothing")
    groups, kept = scale_groups(program, plan)
    sites: dict[str, Site] = {site.name: site for site in find_sites(program) if site.path is not None}
    weights: dict[str, Any] = dict(program.weights)
    pairs = [(group, first) for group in groups if (first := _product_before(group)) is not None]
    totals: dict[int, np.ndarray] = {}
    steps: list[Step] = []
    done, largest = 0, float("inf")
    while done < rounds and largest > tolerance:
        done, largest = done + 1, 0.0
        for index, (group, first) in enumerate(pairs):
            before = column_absmax(sites[first.site], first, weights[first.path])
            factor = fitted(weights, sites, group, pair_factor(before, weight_absmax(weights, group)))
            weights = scaled_weights(weights, sites, group, factor, steps)
            host = np.asarray(factor)
            totals[index] = totals[index] * host if index in totals else host
            largest = max(largest, float(np.max(np.abs(np.log(host)))))
    reports = [unchanged(name, reason) for name, reason in kept.items()]
    for index, (group, first) in enumerate(pairs):
        metrics = {"largest_factor": float(totals[index].max()), "smallest_factor": float(totals[index].min())}
        for site in group.sites:
            action = f"equalized with {first.site}"
            reports.append(weight_report(site, action, weights[str(site.path)], metrics=metrics))
    paired = {site.name for group, _ in pairs for site in group.sites}
    for group in groups:
        reason = group.reason or "no product stands before it"
        reports += [unchanged(site.name, reason) for site in group.sites if site.name not in paired]
    report = PassReport("equalize", time.perf_counter() - start, tuple(reports), {"rounds": done})
    history, derivation = (*program.history, report), program.derived(*steps)
    return program.replace(weights=weights, history=history, derivation=derivation)


@jax.jit
def pair_factor(first: jax.Array, second: jax.Array) -> jax.Array:
    """The divisor of the first weight's channels: `sqrt(first / second)`, or 1 if either range is zero.

    >>> pair_factor(jnp.array([1.0, 100.0]), jnp.array([1.0, 1.0])).tolist()
    [1.0, 10.0]
    """
    alive = (first > 0) & (second > 0)
    one = jnp.ones_like(first)
    ratio = jnp.where(alive, first, one) / jnp.where(alive, second, one)
    return jnp.where(alive, usable(jnp.sqrt(ratio)), one)


def _product_before(group: FactorGroup) -> Absorber | None:
    """The only product among a group's absorbers, if there is exactly one."""
    found = [absorber for absorber in group.absorbers if absorber.axis is not None]
    return found[0] if len(found) == 1 else None
