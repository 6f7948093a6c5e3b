"""Activation statistics for post-training methods, measured in one pass over data."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.errors import CalibrationError
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.calibration import EMPTY, as_batches, check_batch
from lepton_xla.passes.core.names import Key
from lepton_xla.passes.core.sites import Site, rewrite_sites
from lepton_xla.passes.core.walker import Context, TapName, Values, materialize
from lepton_xla.program import Program

# Memory limit for the Gram matrices of one pass over the data; a single matrix may exceed it.
GRAM_LIMIT_BYTES = 2**28
# Side input of a weight: the index of the product's scan step.
_STEP = "step"
# Statistics of each column of a site's activation, besides Gram matrices.
_SUMS = ("absmax", "sum", "sum_abs", "sum_square")

type _Totals = dict[TapName, jax.Array]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the activations `X` of one site, as rows of the matrices of `passes.core.matrix`.

    Attributes:
        rows: number of rows, `[*steps]`, float64 on the host; 0 where the data never reached a step.
        absmax: largest magnitude of each column, `[*steps, B, K]`, float32.
        mean: mean of each column, likewise; 0 where there are no rows.
        mean_abs: mean magnitude of each column, likewise.
        mean_square: mean square of each column, likewise.
        gram: `X^T X / rows`, `[*steps, B, K, K]`, float32; None if not requested.
    """

    rows: np.ndarray
    absmax: jax.Array
    mean: jax.Array
    mean_abs: jax.Array
    mean_square: jax.Array
    gram: jax.Array | None = None


def collect_statistics(
    program: Program,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Any]],
    *,
    gram: bool = False,
    limit_bytes: int = GRAM_LIMIT_BYTES,
) -> dict[str, Statistics]:
    """Measure activations at sites, on the device, with one pass over the data for each group of sites.

    Args:
        program: a program whose weights at these sites are float arrays.
        sites: `dot_general` or `conv_general_dilated` sites with a weight, from `find_sites`.
        batches: input dicts, such as `{"image": array}`; at least one.
        gram: whether to compute Gram matrices.
        limit_bytes: memory limit for Gram matrices; if they exceed it, the data is read several times.

    Returns:
        Site name -> statistics, separate for each step of a scan that steps over the site's weight; other repetitions
        of a site are added up.

    Raises:
        CalibrationError: if there are no batches, or one has a wrong name, dtype or shape, is empty or not finite; or
            if an activation is not finite.
    """
    data = list(as_batches(batches))
    if not data:
        raise CalibrationError(EMPTY)
    found: dict[str, Statistics] = {}
    parts = in_parts(sites, functools.partial(gram_bytes, program), limit_bytes) if gram else [sites]
    for part in parts if sites else []:
        found |= _collect(program, part, data, gram)
    return found


def pooled(statistics: Sequence[Statistics], what: Literal["mean_square", "gram"]) -> jax.Array:
    """Average statistics over the sites of a weight, weighted by their rows."""
    if len(statistics) == 1:
        return getattr(statistics[0], what)
    total = np.sum([found.rows for found in statistics], axis=0)
    parts: list[jax.Array] = []
    for found in statistics:
        value = getattr(found, what)
        share = jnp.asarray(found.rows / np.maximum(total, 1), jnp.float32)
        parts.append(value * jnp.reshape(share, share.shape + (1,) * (value.ndim - share.ndim)))
    return sum(parts[1:], parts[0])


def in_parts[T](items: Sequence[T], size_bytes: Callable[[T], int], limit_bytes: int) -> list[list[T]]:
    """Split items into lists of at most `limit_bytes` each, in order; a single item may exceed the limit."""
    parts: list[list[T]] = []
    free = 0
    for item in items:
        size = size_bytes(item)
        if not parts or size > free:
            parts.append([])
            free = limit_bytes
        parts[-1].append(item)
        free -= size
    return parts


def gram_bytes(program: Program, site: Site) -> int:
    """Bytes of the Gram matrices of a site, for all steps of its scans."""
    batch, depth, _ = matrix.matrix_shape(site)
    return math.prod(_steps(program, site)) * batch * depth * depth * 4


def _steps(program: Program, site: Site) -> tuple[int, ...]:
    assert site.path is not None
    return matrix.steps(site, program.weights[site.path])


def _collect(
    program: Program, group: Sequence[Site], data: Sequence[Mapping[str, Any]], gram: bool
) -> dict[str, Statistics]:
    wanted = {site.name: _steps(program, site) for site in group}

    def rule(site: Site, context: Context, eqn: Any, values: Values) -> None:
        del eqn
        if site.name not in wanted or site.weight_operand is None:
            return
        rows = matrix.activation_matrix(site, materialize(values[1 - site.weight_operand]))
        weight = values[site.weight_operand]
        sizes = wanted[site.name]
        step = tuple(weight.side_inputs[site.name, _STEP]) if sizes else ()

        def tap(what: str, value: jax.Array, combine: Any = "sum") -> None:
            whole = jnp.zeros((*sizes, *value.shape), value.dtype).at[step].set(value) if sizes else value
            context.tap((site.name, what), whole, combine)

        tap("rows", _compat.vary(jnp.float32(rows.shape[1]), _compat.varying(rows)))
        tap("absmax", jnp.max(jnp.abs(rows), axis=1, initial=0), "max")
        tap("sum", jnp.sum(rows, axis=1))
        tap("sum_abs", jnp.sum(jnp.abs(rows), axis=1))
        tap("sum_square", jnp.sum(rows * rows, axis=1))
        if gram:
            tap("gram", jnp.einsum("bmk,bml->bkl", rows, rows, precision=jax.lax.Precision.HIGHEST))

    # The index of a product's scan step is a side input of the weight.
    side_inputs: dict[str, dict[Key, jax.Array]] = {}
    for site in group:
        if wanted[site.name]:
            assert site.path is not None
            index = np.moveaxis(np.indices(wanted[site.name]), 0, -1)
            side_inputs.setdefault(site.path, {})[site.name, _STEP] = jnp.asarray(index, jnp.int32)
    observed = rewrite_sites(program.fn, rule, inline=True, side_inputs=side_inputs, on_unknown="keep", with_taps=True)

    @functools.partial(jax.jit, donate_argnums=1)
    def add(weights: Any, totals: _Totals, inputs: Sequence[jax.Array]) -> tuple[_Totals, _Totals]:
        """Add a batch to the sums; return its number of rows separately, because the host counts them in float64."""
        _, taps = observed(weights, *inputs)
        rows: _Totals = {}
        for name, value in taps.items():
            site, what = name
            if what == "absmax":  # stacked by every surrounding scan, not only by those that step over the weight
                value = jnp.max(value, axis=tuple(range(value.ndim - len(wanted[site]) - 2)))
                totals[name] = jnp.maximum(totals[name], value)
            elif what == "rows":
                rows[name] = value
            else:
                totals[name] = totals[name] + value
        return totals, rows

    totals: _Totals = jax.device_put(_zeros(group, wanted, gram))  # `jnp.asarray` would compile a copy of each shape
    counts: dict[TapName, np.ndarray] = {(name, "rows"): np.zeros(steps, np.float64) for name, steps in wanted.items()}
    for count, batch in enumerate(data):
        inputs = check_batch(program, batch, f"calibration batch {count}")
        totals, rows = add(program.weights, totals, inputs)
        for name, value in rows.items():
            counts[name] = counts[name] + np.asarray(value, np.float64)
    shares = {name: (1 / np.maximum(counts[name, "rows"], 1)).astype(np.float32) for name in wanted}
    grams = _scaled({name: totals.pop((name, "gram")) for name in wanted}, shares) if gram else {}
    return {name: _statistics(name, counts[name, "rows"], totals, shares[name], grams.get(name)) for name in wanted}


def _zeros(sites: Sequence[Site], wanted: Mapping[str, tuple[int, ...]], gram: bool) -> dict[TapName, np.ndarray]:
    """Make zeros for the sums, by site and statistic."""
    zeros: dict[TapName, np.ndarray] = {}
    for site in sites:
        batch, depth, _ = matrix.matrix_shape(site)
        shape = (*wanted[site.name], batch, depth)
        zeros |= {(site.name, what): np.zeros(shape, np.float32) for what in _SUMS}
        if gram:
            zeros[site.name, "gram"] = np.zeros((*shape, depth), np.float32)
    return zeros


def _statistics(
    site: str, rows: np.ndarray, totals: dict[TapName, Any], share: np.ndarray, gram: jax.Array | None
) -> Statistics:
    """Compute the statistics of a site; removes its sums from the totals."""
    absmax, *sums = (np.asarray(totals.pop((site, what))) for what in _SUMS)
    if not np.isfinite(absmax).all():
        raise CalibrationError(f"the activation of site {site!r} is not finite on the calibration data")
    means = [each * share[..., None, None] for each in sums]
    return Statistics(rows, *jax.device_put([absmax, *means]), gram=gram)


@functools.partial(jax.jit, donate_argnums=0)
def _scaled(grams: dict[str, jax.Array], shares: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scale all Gram matrices in place; one program for all."""
    return {site: gram * shares[site][..., None, None, None] for site, gram in grams.items()}
