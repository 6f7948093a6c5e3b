"""AWQ: scales up the weights of important input channels, so that rounding them changes the outputs less.

Lin et al. 2023, arXiv:2306.00978. Channel j of the weight is multiplied by `s_j = mean|x_j|^a`, and its activation
divided by it. `a` is searched on a grid from 0 (no change) to 1, by the error of the outputs with weights rounded as
planned.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.derivations import Step
from lepton_xla.errors import RecipeError
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.precomputation import for_plan
from lepton_xla.passes.core.sites import Site, find_sites
from lepton_xla.passes.core.spreading import over_columns
from lepton_xla.passes.core.statistics import Statistics, collect_statistics
from lepton_xla.passes.quantization.gptq import output_squares
from lepton_xla.passes.quantization.rounding import (
    Planned,
    exact_matrices,
    grid_matrices,
    nearest,
    planned_weights,
    whole_grid,
)
from lepton_xla.passes.rescaling.factors import FactorGroup, fitted, usable
from lepton_xla.passes.rescaling.scaling import (
    channel_vector,
    matrix_rows,
    multiply_inputs,
    scale_groups,
    scaled_weights,
)
from lepton_xla.passes.rescaling.smoothquant import group_reports
from lepton_xla.program import Program
from lepton_xla.quant import FORMATS
from lepton_xla.recipe import QuantizeRule
from lepton_xla.report import PassReport, SiteReport, unchanged


def awq_factor(mean_abs: jax.Array, exponent: float | jax.Array) -> jax.Array:
    """The factor of the weights: `mean|x|^exponent`, normalized so that the geometric mean of each step's extremes is
    1.

    Args:
        mean_abs: mean magnitude of each input channel, `[..., channels]`.
        exponent: in [0, 1].

    Returns:
        Positive and finite; 1 for channels that are always zero.

    >>> awq_factor(jnp.array([1.0, 16.0, 0.0]), 0.5).tolist()
    [0.5, 2.0, 1.0]
    """
    alive = mean_abs > 0
    factor = jnp.where(alive, mean_abs, jnp.ones_like(mean_abs)) ** exponent
    high = jnp.max(jnp.where(alive, factor, jnp.zeros_like(factor)), axis=-1, keepdims=True)
    low = jnp.min(jnp.where(alive, factor, jnp.full_like(factor, jnp.inf)), axis=-1, keepdims=True)
    return jnp.where(alive, usable(factor / jnp.sqrt(high * low)), jnp.ones_like(factor))


@takes(program=Program, plan=Plan)
def awq(
    program: Program,
    plan: Plan,
    batches: Iterable[Mapping[str, Any]],
    *,
    points: int = 20,
    multiply: bool = True,
) -> Program:
    """Scale the input channels of planned products so that their rounded weights change the outputs least.

    The float function is unchanged. As in `smooth`, products that share an activation share its factor, which is folded
    into preceding weights where possible. A group for which no exponent beats 0 is not changed.

    Args:
        program: the float program that the plan was made for.
        plan: the products, and how their weights are rounded.
        batches: input dicts, such as `{"image": array}`; at least one.
        points: number of exponents to try besides 0.
        multiply: whether to multiply an activation if no preceding weight can absorb the factor; otherwise its products
            are left unchanged.

    Raises:
        RecipeError: if `points` is not positive, or groups do not divide a weight.
        CalibrationError: as `collect_statistics`.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> plan = lx.passes.resolve(lx.Recipe.load("int8"), program)
    >>> scaled = lx.passes.awq(program, plan, [{"x": np.ones((2, 4), np.float32)}], points=4)
    >>> scaled.history[-1].name
    'awq'
    """
    program = for_plan(program, plan)
    start = time.perf_counter()
    if points < 1:
        raise RecipeError(f"AWQ with {points} exponents to try does nothing")
    groups, kept = scale_groups(program, plan)
    sites: dict[str, Site] = {site.name: site for site in find_sites(program) if site.path is not None}
    found = collect_statistics(program, [group.sites[0] for group in groups], batches, gram=True)
    weights: dict[str, Any] = dict(program.weights)
    multiplied: list[tuple[FactorGroup, jax.Array]] = []
    steps: list[Step] = []
    reports: list[SiteReport] = []
    for group in groups:
        if not group.absorbers and not multiply:
            reports += [unchanged(site.name, group.reason) for site in group.sites]
            continue
        now = planned_weights(program.replace(weights=weights), plan)[0]
        names = {site.name for site in group.sites}
        planned = [each for each in now if each.site.name in names]
        exponent, factor, errors = _search(planned, found[group.sites[0].name], points)
        metrics = {"exponent": exponent, "output_error": errors[1], "nearest_output_error": errors[0]}
        if exponent == 0:
            reports += [unchanged(site.name, "no factor errs less", metrics=metrics) for site in group.sites]
            continue
        factor = fitted(weights, sites, group, factor)
        weights = scaled_weights(weights, sites, group, factor, steps)
        if not group.absorbers:
            multiplied.append((group, jnp.asarray(1 / np.asarray(factor))))
        reports += group_reports(group, factor, weights, metrics)
    reports += [unchanged(name, reason) for name, reason in kept.items()]
    scaled = program.replace(weights=weights, derivation=program.derived(*steps))
    changed = multiply_inputs(scaled, multiplied)
    report = PassReport("awq", time.perf_counter() - start, tuple(reports))
    return changed.replace(history=(*program.history, report))


def _search(planned: list[Planned], found: Statistics, points: int) -> tuple[float, jax.Array, tuple[float, float]]:
    """The exponent with the least error over a group's products, its factor, and the relative errors at 0 and there."""
    assert found.gram is not None
    kinds = tuple((Alike(each.site), each.rule) for each in planned)
    stored = [over_columns(each.site, each.stored) for each in planned]
    candidates = [0.0, *((point + 1) / points for point in range(points))]
    measured = [_error(np.float32(exponent), stored, found.gram, found.mean_abs, kinds) for exponent in candidates]
    errors = [float(error) for error, _ in measured]
    best = min(range(len(candidates)), key=errors.__getitem__)
    scale = max(float(_outputs(stored, found.gram, kinds)), float(np.finfo(np.float32).tiny))
    relative = ((errors[0] / scale) ** 0.5, (errors[best] / scale) ** 0.5)
    return candidates[best], measured[best][1], relative


type _Kinds = tuple[tuple[Alike, QuantizeRule], ...]


@functools.partial(jax.jit, static_argnames="kinds")
def _error(
    exponent: jax.Array, stored: list[jax.Array], gram: jax.Array, mean_abs: jax.Array, kinds: _Kinds
) -> tuple[jax.Array, jax.Array]:
    """The squared error of a group's outputs at an exponent, and the factor."""
    factor = awq_factor(channel_vector(kinds[0][0].site, mean_abs, jnp.mean), exponent)
    errors = [
        rounded_error(like.site, rule, exact_matrices(weight, like), gram, factor)
        for weight, (like, rule) in zip(stored, kinds, strict=True)
    ]
    return sum(errors[1:], errors[0]), factor


@functools.partial(jax.jit, static_argnames="kinds")
def _outputs(stored: list[jax.Array], gram: jax.Array, kinds: _Kinds) -> jax.Array:
    """The sum of squares of a group's outputs."""
    squares = [
        jnp.sum(_squares(exact_matrices(weight, like), gram)) for weight, (like, _) in zip(stored, kinds, strict=True)
    ]
    return sum(squares[1:], squares[0])


def rounded_error(site: Site, rule: QuantizeRule, exact: jax.Array, gram: jax.Array, factor: jax.Array) -> jax.Array:
    """`||X (W - Q(s W) / s)||^2`, where Q uses the grid of the scaled weight."""
    rows = matrix_rows(site, factor)
    scaled = exact * rows
    rounded = nearest(scaled, grid_matrices(site, whole_grid(site, rule, scaled)), FORMATS[rule.weights])
    return jnp.sum(_squares(exact - rounded / rows, gram))


def _squares(difference: jax.Array, gram: jax.Array) -> jax.Array:
    lead = difference.shape[:-2]
    at_once = max(1, 2**24 // max(difference.shape[-2] ** 2, 1))
    return matrix.batched_map(output_squares, lead, difference, gram, at_once=at_once)
