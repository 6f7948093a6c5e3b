"""Rounds planned weights to the grids of their formats, in float, for methods that choose the codes.

Such a method returns a program whose float weights lie on their grids, and the grids. `quantize` later uses the same
scales, zero points and levels, and so finds exactly these codes.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.derivations import Step
from lepton_xla.errors import ModelError
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.plans import Plan, SitePlan
from lepton_xla.passes.core.precomputation import for_plan
from lepton_xla.passes.core.sites import Site
from lepton_xla.program import Program
from lepton_xla.quant import FORMATS
from lepton_xla.quant.formats import Format
from lepton_xla.quant.grid import Grid, make_grid, matrix_codes, matrix_values
from lepton_xla.recipe import QuantizeRule
from lepton_xla.report import Outcome, PassReport, SiteReport, unchanged
from lepton_xla.trees import leaf_bytes

# Steps of passes that round weights to their grids in float.
ROUNDINGS = ("gptq", "round")

type GivenGrids = dict[str, dict[str, jax.Array]]
"""Weight path -> `scale`, and `zero_point` or `codebook` if the format has them, with the axes of stored codes."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A weight to quantize.

    Attributes:
        path: the weight's path.
        entries: the plans of all sites that use it.
        site: the first of them that is a product.
        rule: their common rule.
        stored: the weight in the program.
    """

    path: str
    entries: tuple[SitePlan, ...]
    site: Site
    rule: QuantizeRule
    stored: jax.Array

    @property
    def exact(self) -> jax.Array:
        """The weight's matrices `[*steps, B, K, N]`, float32; not cached, because copies of all would be large."""
        return exact_matrices(self.stored, Alike(self.site))

    @property
    def target(self) -> Format:
        """The storage format."""
        return FORMATS[self.rule.weights]

    @property
    def products(self) -> tuple[Site, ...]:
        """Its sites without lookups, which have no contracted inputs."""
        return tuple(entry.site for entry in self.entries if entry.site.kind != "gather")


def planned_weights(program: Program, plan: Plan) -> tuple[list[Planned], list[SiteReport]]:
    """The planned weights that are used in products; and reports of the skipped sites.

    Raises:
        ModelError: if one of them is not finite.
    """
    planned: list[Planned] = []
    kept = [unchanged(entry.site.name, entry.not_quantized) for entry in plan.sites if entry.not_quantized]
    for path, entries in plan.quantized.items():
        sites = [entry.site for entry in entries if entry.site.kind != "gather"]
        rule = entries[0].quantize
        assert rule is not None
        if not sites:
            kept.append(unchanged(entries[0].site.name, "only looked up, so rounded to nearest when stored"))
            continue
        if not is_finite(program.weights[path]):
            raise ModelError(f"the weight of site {sites[0].name!r} is not finite")
        planned.append(Planned(path, tuple(entries), sites[0], rule, program.weights[path]))
    return planned, kept


@functools.partial(jax.jit, static_argnames="like")
def exact_matrices(stored: jax.Array, like: Alike) -> jax.Array:
    """Reshape a stored weight to matrices `[*steps, B, K, N]`, float32."""
    return matrix.stored_matrix(like.site, stored).astype(jnp.float32)


def is_finite(array: jax.Array) -> bool:
    """Whether an array is finite; checked on the host, where nothing must be compiled."""
    host = np.asarray(array)
    if host.dtype.kind not in "fc":  # a float that NumPy does not know, such as bfloat16
        host = host.astype(np.float32)
    return bool(np.isfinite(host).all())


def whole_grid(site: Site, rule: QuantizeRule, exact: jax.Array) -> Grid:
    """The grid of a rule, with the axes of stored codes.

    Args:
        site: the product.
        rule: format, granularity and range.
        exact: the weight's matrices `[*steps, B, K, N]`.

    Raises:
        RecipeError: if groups do not divide the contracted dimension; the message names the granularity.
    """
    target = FORMATS[rule.weights]
    return make_grid(matrix.as_stored(site, exact), target, rule.granularity, rule.weight_range)


def given(grid: Grid) -> dict[str, jax.Array]:
    """The parts of a grid by name."""
    parts = {"scale": grid.scale, "zero_point": grid.zero_point, "codebook": grid.codebook}
    return {name: array for name, array in parts.items() if array is not None}


def grid_matrices(site: Site, grid: Grid) -> Grid:
    """Reshape a grid to the axes of the weight's matrices: scale `[*steps, B, G, N]`, levels `[*steps, B, levels]`."""
    levels = grid.codebook
    if levels is not None:
        lead, batch = levels.shape[: site.stacked], matrix.matrix_shape(site)[0]
        levels = jnp.reshape(levels, (*lead, -1, levels.shape[-1]))
        levels = jnp.broadcast_to(levels, (*lead, batch, levels.shape[-1]))
    scale = matrix.from_stored(site, grid.scale)
    return Grid(scale, None if grid.zero_point is None else matrix.from_stored(site, grid.zero_point), levels)


def nearest(values: jax.Array, grid: Grid, target: Format) -> jax.Array:
    """Round matrices `[..., K, N]` to the nearest values of a grid."""
    return matrix_values(matrix_codes(values, grid, target), grid, target)


def weight_report(
    site: Site,
    action: str,
    stored: Any,
    reason: str = "",
    metrics: Mapping[str, Any] | None = None,
    outcome: Outcome = "changed",
) -> SiteReport:
    """Make the report of a site whose weight keeps its bytes."""
    size = leaf_bytes(stored.shape, stored.dtype)
    return SiteReport(site.name, action, reason, size, size, dict(metrics or {}), outcome)


@takes(program=Program, plan=Plan)
def round_to_nearest(program: Program, plan: Plan) -> tuple[Program, GivenGrids]:
    """Round each planned weight to its grid, in float, as storing it would do; a baseline for other methods.

    Returns:
        The program with rounded float weights, and its grids.

    Raises:
        RecipeError, ModelError: as `whole_grid` and `planned_weights`.

    >>> weights = {"w": jnp.array([[7.0, 1.0], [2.6, 0.0]])}
    >>> program = lx.trace(lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> recipe = lx.Recipe.load("int4-channel-weight-only").replace({"quantize.0.weight_range": "absmax"})
    >>> rounded, grids = lx.passes.round_to_nearest(program, lx.passes.resolve(recipe, program))
    >>> np.round(rounded.weights["w"], 2).tolist()
    [[7.0, 1.0], [3.0, 0.0]]
    """
    program = for_plan(program, plan)
    start = time.perf_counter()
    weights: dict[str, Any] = dict(program.weights)
    grids: GivenGrids = {}
    found, reports = planned_weights(program, plan)
    for planned in found:
        weights[planned.path], grid = _nearest(planned.stored, Alike(planned.site), planned.rule)
        grids[planned.path] = given(grid)
        action = f"{planned.rule.weights} nearest"
        reports += [weight_report(entry.site, action, weights[planned.path]) for entry in planned.entries]
    report = PassReport("round", time.perf_counter() - start, tuple(reports))
    derivation = program.derived(Step("round", gives=tuple(grids)))  # storing rounds likewise
    return program.replace(weights=weights, history=(*program.history, report), derivation=derivation), grids


@functools.partial(jax.jit, static_argnames=("like", "rule"))
def _nearest(stored: jax.Array, like: Alike, rule: QuantizeRule) -> tuple[jax.Array, Grid]:
    """Round a stored weight to the nearest values of its grid; return it and the grid."""
    exact = matrix.stored_matrix(like.site, stored).astype(jnp.float32)
    grid = whole_grid(like.site, rule, exact)
    rounded = nearest(exact, grid_matrices(like.site, grid), FORMATS[rule.weights])
    return matrix.stored_weight(like.site, rounded, stored), grid
