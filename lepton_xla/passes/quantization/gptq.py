"""GPTQ: rounds a weight row by row; the remaining rows compensate the error of each row.

Frantar et al. 2022, arXiv:2210.17323. It minimizes the error of the outputs, `||X (W - Q)||`, which needs only the Gram
matrix of the inputs, `X^T X`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla import _compat
from lepton_xla.arguments import takes
from lepton_xla.derivations import Step
from lepton_xla.passes.core import matrix, memory
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.calibration import as_batches
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.precomputation import for_plan
from lepton_xla.passes.core.spreading import over_columns
from lepton_xla.passes.core.statistics import (
    GRAM_LIMIT_BYTES,
    Statistics,
    collect_statistics,
    gram_bytes,
    in_parts,
    pooled,
)
from lepton_xla.passes.quantization.error_feedback import (
    DAMPING_TRIES,
    LEAST_DAMPING,
    factor_once,
    inverse_factor,
    sweep,
)
from lepton_xla.passes.quantization.rounding import (
    GivenGrids,
    Planned,
    given,
    grid_matrices,
    nearest,
    planned_weights,
    weight_report,
    whole_grid,
)
from lepton_xla.program import Program
from lepton_xla.quant import FORMATS
from lepton_xla.quant.formats import Format
from lepton_xla.quant.grid import Grid, decode, encode
from lepton_xla.recipe import QuantizeRule
from lepton_xla.report import PassReport, SiteReport

# Number of elements of Gram matrices that are factored together.
ELEMENTS_AT_ONCE = 2**22
# Weights of up to this many elements are rounded in parallel.
SMALL = 2**20
# Gram matrices of up to this many rows are factored by code that XLA optimizes less, which it compiles twice as fast.
SMALL_DEPTH = 1024
# Before the data is read, code is compiled for Gram matrices of up to this many bytes.
SMALL_GRAM_BYTES = 2**24
# Number of columns of a weight that are rounded together: columns are independent, and rounding takes several copies.
COLUMNS_AT_ONCE = 4096

_HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of GPTQ.

    Attributes:
        act_order: whether to round rows in descending order of their inputs' magnitude. Groups are formed by
            neighbouring rows of the weight either way.
        damping: added to the diagonal of the Gram matrix, as a share of its mean.
        block: number of rows whose errors are propagated to the rest together. Within a block each row updates all
            later ones, so a block should fit into a cache.
    """

    act_order: bool = True
    damping: float = 0.01
    block: int = 32


def gptq_values(
    weight: jax.Array,
    gram: jax.Array,
    grid: Grid,
    target: Format,
    options: Options | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Round one weight matrix to a grid.

    The scales of groups are fixed beforehand: rounding one group does not change the grid of the next.

    Args:
        weight: `[K, N]`, float32 or float64; everything is computed in its dtype.
        gram: `[K, K]`, `X^T X` up to a factor. A row of zeros means an input that was never active; its weights are
            rounded to nearest. If the matrix is singular, damping is increased.
        grid: scale and zero point `[G, N]` for G groups of rows, levels `[levels]`.
        target: the format.
        options: see `Options`.
        mask: bool `[K, N]`: False marks an element that stays zero; the others compensate its error.

    Returns:
        `[K, N]`, values of the grid.
    """
    options = options or Options()
    return _rounded(weight, _ordered(gram.astype(weight.dtype), options), grid, target, options, mask)


def _ordered(gram: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """The order in which rows are rounded, `[K]`, and the `inverse_factor` of the reordered Gram matrix."""
    order, reordered, mean = _reordered(gram, options.act_order)
    return order, inverse_factor(reordered, mean, options.damping)


def _reordered(gram: jax.Array, act_order: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The order, the Gram matrix in that order, and the mean of its diagonal; inputs that were never seen count 1."""
    seen = jnp.diagonal(gram)
    gram = gram + jnp.diag(jnp.where(seen <= 0, jnp.ones_like(seen), jnp.zeros_like(seen)))
    order = jnp.argsort(-seen) if act_order else jnp.arange(len(seen))
    return order, _take(_take(gram, order).T, order).T, jnp.mean(seen)


def _rounded(
    weight: jax.Array,
    ordered: tuple[jax.Array, jax.Array],
    grid: Grid,
    target: Format,
    options: Options,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute `gptq_values` from the result of `_ordered`."""
    depth, columns = weight.shape
    dtype = weight.dtype
    order, factor = ordered

    # Rows are padded to whole blocks; a padded row is zero, and affects no other row.
    block = min(options.block, depth)
    padding = -depth % block
    groups = order // (depth // grid.scale.shape[0])
    rows = jnp.pad(_take(weight, order), ((0, padding), (0, 0)))
    scale = jnp.broadcast_to(grid.scale, (grid.scale.shape[0], columns)).astype(jnp.float32)
    scale = jnp.pad(_take(scale, groups), ((0, padding), (0, 0)), constant_values=1)
    zero = kept = None
    if grid.zero_point is not None:
        zero = jnp.broadcast_to(grid.zero_point, (grid.scale.shape[0], columns)).astype(jnp.float32)
        zero = jnp.pad(_take(zero, groups), ((0, padding), (0, 0)))
    if mask is not None:
        kept = jnp.pad(_take(mask, order), ((0, padding), (0, 0)))
    factor = jnp.pad(factor, ((0, padding), (0, padding)))
    diagonal = jnp.diagonal(factor)
    diagonal = jnp.where(diagonal == 0, jnp.ones_like(diagonal), diagonal)

    def round_row(row: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start, part, rounded, errors, corner = state
        at = start + row
        exact, row_scale = _row(part, row), _row(scale, at)
        row_zero = None if zero is None else _row(zero, at)
        code = encode(exact, row_scale, target, row_zero, grid.codebook)
        value = decode(code, row_scale, target, row_zero, grid.codebook).astype(dtype)
        if kept is not None:
            value = jnp.where(_row(kept, at), value, jnp.zeros_like(value))
        error = (exact - value) / _row(diagonal, at)
        part = part - jnp.outer(_row(corner, row), error)
        rounded, errors = (
            lax.dynamic_update_index_in_dim(whole, new, row, 0) for whole, new in ((rounded, value), (errors, error))
        )
        return start, part, rounded, errors, corner

    def round_block(start: jax.Array, part: jax.Array, corner: jax.Array) -> tuple[jax.Array, jax.Array]:
        blank = jnp.zeros_like(part)
        _, _, rounded, errors, _ = lax.fori_loop(0, block, round_row, (start, part, blank, blank, corner))
        return rounded, errors

    done = sweep(rows, factor, block, round_block, jnp.zeros_like(rows))
    return jnp.zeros_like(weight).at[order].set(done[:depth], unique_indices=True, mode="promise_in_bounds")


# Indices are in bounds and not negative; to check them takes XLA a third of the time to compile all this.
_row = functools.partial(lax.dynamic_index_in_dim, keepdims=False)


def _take(array: jax.Array, rows: jax.Array) -> jax.Array:
    return array.at[rows].get(mode="promise_in_bounds")


@takes(program=Program, plan=Plan)
def gptq(
    program: Program,
    plan: Plan,
    batches: Iterable[Mapping[str, Any]],
    *,
    options: Options | None = None,
    sequential: bool = False,
    known: dict[str, Rounded] | None = None,
) -> tuple[Program, GivenGrids]:
    """Round each planned weight to its grid such that its outputs on the data change least.

    Each output column uses GPTQ or rounding to nearest, whichever has the smaller error on the data. Pruned elements
    stay zero.

    Args:
        program: the float program that the plan was made for.
        plan: the weights and their formats.
        batches: input dicts, such as `{"image": array}`; at least one.
        options: see `Options`.
        sequential: whether to measure the inputs of each weight with all preceding weights already rounded, as the
            paper does, which takes one pass over the data per weight. By default all inputs are measured in one pass on
            the float program.
        known: cache of rounded weights, by path. An unchanged weight whose products have unchanged inputs is not
            rounded again.

    Returns:
        The program with float weights on their grids, and the grids for `quantize`.

    Raises:
        CalibrationError: as `collect_statistics`.
        RecipeError, ModelError: as `whole_grid` and `planned_weights`.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> plan = lx.passes.resolve(lx.Recipe.load("int4-weight-only"), program)
    >>> rounded, grids = lx.passes.gptq(program, plan, [{"x": np.ones((2, 4), np.float32)}])
    >>> list(grids)
    ['w']
    """
    program = for_plan(program, plan)
    start = time.perf_counter()
    options = options or Options()
    data = list(as_batches(batches))
    weights: dict[str, Any] = dict(program.weights)
    all_planned, reports = planned_weights(program, plan)
    grids: GivenGrids = {}
    known = {} if known is None else known
    digests = {planned.path: _digest(planned.stored) for planned in all_planned}
    changed = [each for each in all_planned if each.path not in known or known[each.path].of != digests[each.path]]
    found: dict[str, Statistics] = {}

    def round_one(planned: Planned) -> None:
        seen = [found.pop(site.name) for site in planned.products]
        rounded, grid, errors = _round(planned, pooled(seen, "gram"), program.masks.get(planned.path), options)
        reached = bool(np.all(np.sum([each.rows for each in seen], axis=0) > 0))
        reports = _reports(planned, rounded, reached, errors)
        kept = memory.in_file(rounded, program.weights)
        known[planned.path] = Rounded(digests[planned.path], kept, given(grid), reports)

    # A few weights at a time, so that their Gram matrices fit into memory; they are released after rounding.
    all_bytes = functools.partial(_gram_bytes, program)
    for part in [] if sequential else in_parts(changed, all_bytes, GRAM_LIMIT_BYTES):
        # For small weights most of the time is compiling, which releases the interpreter lock. It begins before the
        # data is read: zeros of the same shapes are rounded.
        first = _small_of_each_kind(part)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            if (
                pool.submit(_compat.settings).result() != _compat.settings()
            ):  # otherwise the threads would compute with other settings
                first = []
            for planned in first if not known else ():
                pool.submit(_round_zeros, program, planned, options)
            found |= collect_statistics(program, [site for each in part for site in each.products], data, gram=True)
            memory.give_back()
            list(pool.map(round_one, first))
        for planned in part:
            if planned.path not in {each.path for each in first}:
                round_one(planned)
    for planned in all_planned:
        path = planned.path
        if path not in known or known[path].of != digests[path]:
            found = collect_statistics(program.replace(weights=weights), planned.products, data, gram=True)
            round_one(planned)
        weights[path], grids[path] = known[path].weight, known[path].grid
        reports += known[path].reports
    memory.give_back()
    report = PassReport("gptq", time.perf_counter() - start, tuple(reports))
    why = "it chooses codes for the calibration data"
    derivation = program.derived(Step("gptq", gives=tuple(grids), reason=why, skippable=True))
    return program.replace(weights=weights, history=(*program.history, report), derivation=derivation), grids


def _round_zeros(program: Program, planned: Planned, options: Options) -> None:
    """Compile what rounding this weight needs."""
    site = planned.products[0]
    if gram_bytes(program, site) > SMALL_GRAM_BYTES:
        return
    batch, depth, _ = matrix.matrix_shape(site)
    steps = matrix.steps(site, planned.stored)
    gram = jax.device_put(np.zeros((*steps, batch, depth, depth), np.float32))
    zeros = jax.device_put(np.zeros(planned.stored.shape, planned.stored.dtype))
    mask = program.masks.get(planned.path)
    _better_of_two(zeros, gram, _all_ordered(gram, options), mask, Alike(planned.site), planned.rule, options)


def _gram_bytes(program: Program, planned: Planned) -> int:
    return sum(gram_bytes(program, site) for site in planned.products)


def _small_of_each_kind(planned: Sequence[Planned]) -> list[Planned]:
    """One weight for each group that shares compiled code, among weights small enough to be rounded in parallel."""
    small = [each for each in planned if each.stored.size <= SMALL]
    return list({(Alike(each.site), each.rule): each for each in reversed(small)}.values())


@dataclasses.dataclass(frozen=True)
class Rounded:
    """The result of rounding one weight.

    Attributes:
        of: a digest of the weight.
        weight: the rounded weight.
        grid: its grid.
        reports: one for each of its sites.
    """

    of: bytes
    weight: jax.Array
    grid: dict[str, jax.Array]
    reports: list[SiteReport]


@dataclasses.dataclass(frozen=True)
class _Errors:
    """Relative errors of the outputs, `||X (W - Q)|| / ||X W||`, over all steps."""

    gptq: float
    nearest: float


def _round(
    planned: Planned, gram: jax.Array, mask: jax.Array | None, options: Options
) -> tuple[jax.Array, Grid, _Errors]:
    """Round a stored weight, each column by the better of the two methods; return it and its grid."""
    ordered = _all_ordered(gram, options)
    stored = over_columns(planned.site, planned.stored)
    mask = None if mask is None else over_columns(planned.site, mask)
    rounded, grid, sums = _better_of_two(stored, gram, ordered, mask, Alike(planned.site), planned.rule, options)
    best, plain, total = (float(part) for part in sums)
    size = max(total, float(np.finfo(np.float32).tiny))
    rounded = rounded if stored is planned.stored else jax.device_put(rounded, planned.stored.sharding)
    return rounded, grid, _Errors((best / size) ** 0.5, (plain / size) ** 0.5)


def _all_ordered(gram: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """Apply `_ordered` to each of `[*steps, B, K, K]`.

    Damping grows on the host: XLA takes twice as long to compile the loop that `inverse_factor` has.
    """
    factor = _factor_small if gram.shape[-1] <= SMALL_DEPTH else _factor
    damping = np.full(gram.shape[:-2], options.damping, np.float32)
    for _ in range(DAMPING_TRIES):
        order, found, exists = factor(gram, damping, options.act_order)
        missing = ~np.asarray(exists)
        if not missing.any():
            return order, found
        damping = np.where(missing, np.maximum(10 * damping, np.float32(LEAST_DAMPING)), damping)
    return factor(gram, damping, options.act_order)[:2]


def _factors(gram: jax.Array, damping: jax.Array, act_order: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The order, the `inverse_factor` with this damping, and whether it exists, of each of `[*steps, B, K, K]`."""

    def one(gram: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        order, reordered, mean = _reordered(gram, act_order)
        factor = factor_once(reordered, mean, damping)
        return order, factor, jnp.all(jnp.isfinite(factor))

    at_once = ELEMENTS_AT_ONCE // gram.shape[-1] ** 2
    return matrix.batched_map(one, gram.shape[:-2], gram.astype(jnp.float32), damping, at_once=at_once)


# Nearly all work is in library calls, which the optimization level does not change, so it pays for large ones only.
_factor = jax.jit(_factors, static_argnames="act_order")
_factor_small = jax.jit(_factors, static_argnames="act_order", compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jax.jit, static_argnames=("like", "rule", "options"))
def _better_of_two(
    stored: jax.Array,
    gram: jax.Array,
    ordered: tuple[jax.Array, jax.Array],
    mask: jax.Array | None,
    like: Alike,
    rule: QuantizeRule,
    options: Options,
) -> tuple[jax.Array, Grid, jax.Array]:
    """The rounded weight, its grid, and sums of squares: of the outputs' errors, of those by nearest, of the outputs.

    Separate, so that weights of equal shape share compiled code.
    """
    site, target = like.site, FORMATS[rule.weights]
    exact = matrix.stored_matrix(site, stored).astype(jnp.float32)
    grid = whole_grid(site, rule, exact)
    kept = None if mask is None else matrix.stored_matrix(site, mask.astype(stored.dtype)) != 0

    def one(
        weight: jax.Array, gram: jax.Array, ordered: tuple[jax.Array, jax.Array], grid: Grid, kept: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        def columns(weight: jax.Array, grid: Grid, kept: jax.Array | None) -> tuple[jax.Array, ...]:
            plain = nearest(weight, grid, target)
            if kept is not None:
                plain = jnp.where(kept, plain, jnp.zeros_like(plain))
            chosen = _rounded(weight, ordered, grid, target, options, kept)
            squares = [output_squares(weight - rounded, gram) for rounded in (chosen, plain)]
            chosen = jnp.where(squares[0] <= squares[1], chosen, plain)
            return chosen, jnp.minimum(*squares), squares[1], output_squares(weight, gram)

        return _by_columns(columns, weight, grid, kept)

    at_once = ELEMENTS_AT_ONCE // exact.shape[-2] ** 2
    matrices = grid_matrices(site, grid)
    parts = (exact, gram, ordered, matrices, kept)
    chosen, *squares = matrix.batched_map(one, exact.shape[:-2], *parts, at_once=at_once)
    sums = jnp.stack([jnp.sum(part) for part in squares])
    return matrix.stored_weight(site, chosen, stored), grid, sums


def _by_columns(
    function: Callable[[jax.Array, Grid, jax.Array | None], tuple[jax.Array, ...]],
    weight: jax.Array,
    grid: Grid,
    kept: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Apply a function to a weight `[K, N]`, at most `COLUMNS_AT_ONCE` columns at a time.

    Args:
        function: returns arrays whose last axis is the weight's columns; each column depends only on the same column.
        weight: `[K, N]`.
        grid: scale and zero point `[G, N]`, levels `[levels]`. kept: bool `[K, N]` or None.
    """
    columns = weight.shape[-1]
    turns = -(-columns // COLUMNS_AT_ONCE)
    if turns <= 1:
        return function(weight, grid, kept)
    width = -(-columns // turns)

    def cut(array: jax.Array | None, start: jax.Array) -> jax.Array | None:
        return None if array is None else lax.dynamic_slice_in_dim(array, start, width, axis=-1)

    def turn(number: jax.Array, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start = jnp.minimum(number * width, columns - width)  # some of the last columns are computed twice
        part = dataclasses.replace(grid, scale=cut(grid.scale, start), zero_point=cut(grid.zero_point, start))
        made = function(lax.dynamic_slice_in_dim(weight, start, width, axis=-1), part, cut(kept, start))
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, new, start, axis=-1) for whole, new in zip(done, made, strict=True)
        )

    shapes = jax.eval_shape(function, weight, grid, kept)
    return lax.fori_loop(0, turns, turn, tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes))


def output_squares(weight: jax.Array, gram: jax.Array) -> jax.Array:
    """`||X w||^2` of each column of `[K, N]`."""
    return jnp.maximum(jnp.sum(weight * jnp.matmul(gram, weight, precision=_HIGHEST), axis=0), 0)


def _reports(planned: Planned, stored: Any, reached: bool, errors: _Errors) -> list[SiteReport]:
    reason = "" if reached else "to nearest where the calibration data does not reach it"
    metrics = {"output_error": errors.gptq, "nearest_output_error": errors.nearest}
    action = f"{planned.rule.weights} gptq"
    return [weight_report(entry.site, action, stored, reason, metrics) for entry in planned.entries]


def _digest(weight: jax.Array) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(np.asarray(weight)).view(np.uint8)).digest()
