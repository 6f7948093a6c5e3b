"""SmoothQuant: moves outliers from activations to weights, channel by channel, so that both quantize well.

Xiao et al. 2022, arXiv:2211.10438. Input channel j of a product is divided by `s_j = max|x_j|^a / max|w_j|^(1 - a)` and
the weight's row j is multiplied by it.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.derivations import Step
from lepton_xla.errors import RecipeError
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.precomputation import for_plan
from lepton_xla.passes.core.sites import Site, find_sites
from lepton_xla.passes.core.statistics import Statistics, collect_statistics
from lepton_xla.passes.quantization.rounding import weight_report
from lepton_xla.passes.rescaling.factors import FactorGroup, fitted, usable
from lepton_xla.passes.rescaling.scaling import (
    channel_vector,
    multiply_inputs,
    scale_groups,
    scaled_weights,
    weight_absmax,
)
from lepton_xla.program import Program
from lepton_xla.report import PassReport, SiteReport, unchanged

WORTHLESS = "it is computed in float, where multiplying its activation brings nothing"


def smooth_factor(act_absmax: jax.Array, weight_absmax: jax.Array, alpha: float) -> jax.Array:
    """The divisor of an activation's channels.

    Args:
        act_absmax: largest magnitude of each input channel on the data, any shape.
        weight_absmax: largest magnitude of the weights for each input channel, same shape.
        alpha: share of the range that moves to the weights, in [0, 1].

    Returns:
        Positive and finite; 1 for channels whose inputs or weights are all zero.

    >>> smooth_factor(jnp.array([16.0, 1.0]), jnp.array([1.0, 1.0]), 0.5).tolist()
    [4.0, 1.0]
    """
    alive = (act_absmax > 0) & (weight_absmax > 0)
    one = jnp.ones_like(act_absmax)
    act, weight = jnp.where(alive, act_absmax, one), jnp.where(alive, weight_absmax, one)
    return jnp.where(alive, usable(act**alpha / weight ** (1 - alpha)), one)


@functools.partial(jax.jit, static_argnames=("like", "alpha"))
def _factor(columns: jax.Array, weight_absmax: jax.Array, like: Alike, alpha: float) -> jax.Array:
    """The factor of a product, from the largest magnitudes of its activation's columns `[*steps, B, K]`."""
    return smooth_factor(channel_vector(like.site, columns, jnp.max), weight_absmax, alpha)


@takes(program=Program, plan=Plan)
def smooth(
    program: Program,
    plan: Plan,
    batches: Iterable[Mapping[str, Any]],
    *,
    alpha: float = 0.5,
    unmultiplied: Collection[str] = (),
    known: dict[str, Statistics] | None = None,
) -> Program:
    """Divide the activations of planned products and multiply their weights; the float function is unchanged.

    Products that share an activation share its factor. It is folded into preceding weights, such as a norm's scale and
    shift, if nothing else reads the activation; otherwise the activation is multiplied at the product.

    Args:
        program: the float program that the plan was made for.
        plan: the products to smooth are those that it quantizes.
        batches: input dicts, such as `{"image": array}`; at least one.
        alpha: share of the range that moves to the weights, in [0, 1].
        unmultiplied: names of products that are left unchanged if no preceding weight can absorb the factor, because
            they are computed in float and multiplying their activations would gain nothing.
        known: cache of the statistics of this program's activations, by site; missing ones are measured and added.

    Raises:
        RecipeError: if alpha is not in [0, 1].
        CalibrationError: as `collect_statistics`.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> plan = lx.passes.resolve(lx.Recipe.load("int8"), program)
    >>> smooth = lx.passes.smooth(program, plan, [{"x": np.float32([[1, 1, 1, 16]])}])  # the last channel is an outlier
    >>> jnp.diag(smooth.weights["w"]).tolist()
    [1.0, 1.0, 1.0, 4.0]
    """
    program = for_plan(program, plan)
    start = time.perf_counter()
    if not 0 <= alpha <= 1:
        raise RecipeError(f"SmoothQuant's alpha = {alpha} is not in [0, 1]")
    groups, kept = scale_groups(program, plan)
    sites: dict[str, Site] = {site.name: site for site in find_sites(program) if site.path is not None}
    found = {} if known is None else known
    missing = [group.sites[0] for group in groups if group.sites[0].name not in found]
    if missing:
        found |= collect_statistics(program, missing, batches)
    weights: dict[str, Any] = dict(program.weights)
    multiplied: list[tuple[FactorGroup, jax.Array]] = []
    steps: list[Step] = []
    reports: list[SiteReport] = []
    for group in groups:
        if not group.absorbers:
            reports += [unchanged(site.name, WORTHLESS) for site in group.sites if site.name in unmultiplied]
            group = dataclasses.replace(group, sites=tuple(s for s in group.sites if s.name not in unmultiplied))
            if not group.sites:
                continue
        first = group.sites[0]
        factor = _factor(found[first.name].absmax, weight_absmax(weights, group), Alike(first), alpha)
        factor = fitted(weights, sites, group, factor)
        weights = scaled_weights(weights, sites, group, factor, steps)
        if not group.absorbers:
            multiplied.append((group, jnp.asarray(1 / np.asarray(factor))))
        reports += group_reports(group, factor, weights)
    reports += [unchanged(name, reason) for name, reason in kept.items()]
    scaled = program.replace(weights=weights, derivation=program.derived(*steps))
    changed = multiply_inputs(scaled, multiplied)
    report = PassReport("smoothquant", time.perf_counter() - start, tuple(reports), {"alpha": alpha})
    return changed.replace(history=(*program.history, report))


def group_reports(
    group: FactorGroup, factor: jax.Array, weights: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> list[SiteReport]:
    """Reports for the products of a group: where the factor was folded into, and further metrics."""
    into = ", ".join(absorber.path for absorber in group.absorbers)
    action, outcome = (f"factor folded into {into}", "changed") if into else ("activation multiplied", "multiplied")
    host = np.asarray(factor)
    metrics = {"largest_factor": float(host.max()), "smallest_factor": float(host.min())}
    metrics |= dict(more or {})
    return [
        weight_report(site, action, weights[str(site.path)], group.reason, metrics, outcome) for site in group.sites
    ]
