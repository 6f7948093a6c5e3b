"""SparseGPT: prunes the elements with the least effect on the outputs, and adjusts later rows to compensate.

Frantar and Alistarh 2023, arXiv:2301.00774. As in GPTQ, rows of the weight are processed in blocks, with the Cholesky
factor of the inverse Gram matrix of the inputs. The mask of a block, or of an N:M group, is chosen when the block
begins.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla.arguments import takes
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.calibration import as_batches
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.precomputation import for_plan
from lepton_xla.passes.core.spreading import over_columns
from lepton_xla.passes.core.statistics import Statistics, collect_statistics, pooled
from lepton_xla.passes.pruning.held import block_quotas, earlier_masks, held_last, held_matrices
from lepton_xla.passes.pruning.magnitude import held_weights, pruned_targets, with_masks
from lepton_xla.passes.pruning.masks import group_masks
from lepton_xla.passes.pruning.ranking import Ranking, keep_largest, keep_largest_on_host
from lepton_xla.passes.pruning.shares import rule_shares
from lepton_xla.passes.pruning.targets import Target
from lepton_xla.passes.pruning.wanda import products, unseen
from lepton_xla.passes.quantization.error_feedback import inverse_factor, sweep
from lepton_xla.passes.quantization.gptq import ELEMENTS_AT_ONCE, output_squares
from lepton_xla.program import Program
from lepton_xla.recipe.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of SparseGPT.

    Attributes:
        damping: added to the diagonal of the Gram matrix, as a share of its mean.
        block: number of rows whose mask is chosen together, and whose errors are propagated together.
    """

    damping: float = 0.01
    block: int = 128


def sparsegpt_values(
    weight: jax.Array,
    gram: jax.Array,
    pattern: Pattern,
    sparsity: float,
    options: Options | None = None,
    kept: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Prune one weight matrix.

    Args:
        weight: `[K, N]`, float32 or float64; everything except the ranking is computed in its dtype.
        gram: `[K, K]`, `X^T X` up to a factor. A row of zeros means an input that was never active: its weights are
            pruned first. If all rows are zero, magnitudes decide.
        pattern: `unstructured`, the same share of each block of rows, or N:M.
        sparsity: share to prune.
        options: see `Options`.
        kept: bool `[K, N]`, False where an earlier mask holds the weight at zero; these are pruned first and stay zero.

    Returns:
        The pruned weight, its remaining elements adjusted to compensate, and the bool mask, both `[K, N]`.
    """
    options = options or Options()
    depth, columns = weight.shape
    gram = gram.astype(weight.dtype)
    seen = jnp.diagonal(gram)
    absent = seen <= 0
    gram = gram + jnp.diag(jnp.where(absent, jnp.ones_like(seen), jnp.zeros_like(seen)))
    factor = inverse_factor(gram, jnp.mean(seen), options.damping)
    first = absent & ~jnp.all(absent)
    worth = jnp.where(first, jnp.zeros_like(seen), 1 / jnp.diagonal(factor) ** 2)

    # Rows are padded to whole blocks; a padded row is zero, is never pruned, and affects no other row.
    group = pattern.rows
    block = min(-(-options.block // group) * group, depth)
    padding = -depth % block
    rows = jnp.pad(weight, ((0, padding), (0, 0)))
    worth = jnp.pad(worth, (0, padding), constant_values=jnp.inf)[:, None]
    factor = jnp.pad(factor, ((0, padding), (0, padding))) + jnp.diag(
        jnp.pad(jnp.zeros(depth, weight.dtype), (0, padding), constant_values=1)
    )
    ends = np.minimum(np.arange(0, depth + padding + 1, block), depth)
    dropped = jnp.asarray(np.diff([round(sparsity * columns * int(end)) for end in ends]), jnp.uint32)
    earlier = None
    if kept is not None:
        dropped = block_quotas(kept, sparsity, block)
        earlier = jnp.pad(kept, ((0, padding), (0, 0)), constant_values=True)

    def scores(part: jax.Array, start: jax.Array) -> jax.Array:
        at = lax.dynamic_slice(worth, (start, 0), (part.shape[0], 1))
        found = jnp.where(jnp.isinf(at), at, part * part * at).astype(jnp.float32)
        return held_last(found, held_at(part, start))

    def held_at(part: jax.Array, start: jax.Array) -> jax.Array | None:
        return None if earlier is None else lax.dynamic_slice(earlier, (start, 0), part.shape)

    def without_held(chosen: jax.Array, start: jax.Array) -> jax.Array:
        before = held_at(chosen, start)
        return chosen if before is None else chosen & before

    def prune_row(row: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        part, kept, errors, corner = state
        value = jnp.where(kept[row], part[row], jnp.zeros_like(part[row]))
        error = (part[row] - value) / corner[row, row]
        part = (part - jnp.outer(corner[row], error)).at[row].set(value)
        return part, kept, errors.at[row].set(error), corner

    def prune_block(start: jax.Array, part: jax.Array, corner: jax.Array) -> tuple[Any, jax.Array]:
        def prune_group(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            part, kept, errors, corner = state
            begin = index * group
            now = lax.dynamic_slice(part, (begin, 0), (group, columns))
            chosen = without_held(group_masks(scores(now, start + begin), pattern, sparsity), start + begin)
            kept = lax.dynamic_update_slice(kept, chosen, (begin, 0))
            return lax.fori_loop(begin, begin + group, prune_row, (part, kept, errors, corner))

        blank = jnp.zeros_like(part)
        if pattern.kind == "n_m":
            state = (part, jnp.ones(part.shape, bool), blank, corner)
            part, kept, errors, _ = lax.fori_loop(0, block // group, prune_group, state)
        else:
            ((kept,),) = keep_largest([Ranking([scores(part, start)], dropped[start // block])])
            kept = without_held(kept, start)
            part, kept, errors, _ = lax.fori_loop(0, block, prune_row, (part, kept, blank, corner))
        return (part, kept), errors

    values, mask = sweep(rows, factor, block, prune_block, (jnp.zeros_like(rows), jnp.zeros(rows.shape, bool)))
    return values[:depth], mask[:depth]


@takes(program=Program, plan=Plan)
def sparsegpt(
    program: Program,
    plan: Plan,
    batches: Iterable[Mapping[str, Any]],
    *,
    options: Options | None = None,
    sequential: bool = False,
) -> Program:
    """Prune the weights for which the plan has `method = "sparsegpt"`.

    Args:
        program: the float program that the plan was made for.
        plan: the weights, their sparsity, and the pattern (unstructured or N:M).
        batches: input dicts, such as `{"image": array}`; at least one.
        options: see `Options`.
        sequential: whether to measure the inputs of each weight with all preceding weights already pruned, as the paper
            does, which takes one pass over the data per weight. By default all inputs are measured in one pass on the
            float program.

    Returns:
        The program with pruned and adjusted weights, and their masks.

    Raises:
        CalibrationError: as `collect_statistics`.
        RecipeError, ModelError: as `prune`.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> rule = lx.train.PruneRule(sites=".*", sparsity=0.5, method="sparsegpt")
    >>> plan = lx.passes.resolve(lx.Recipe(prune=(rule,)), program)
    >>> pruned = lx.passes.sparsegpt(program, plan, [{"x": np.eye(4, dtype=np.float32)}])
    >>> int(pruned.masks["w"].sum())
    8
    """
    program = for_plan(program, plan)
    start = time.perf_counter()
    options = options or Options()
    data = list(as_batches(batches))
    targets = pruned_targets(program, plan, lambda method: method == "sparsegpt")
    met, shares = products(plan, targets), rule_shares(targets)
    weights: dict[str, Any] = {**program.weights, **held_weights(program, targets)}
    earlier = earlier_masks(targets, program.masks)
    masks: dict[str, jax.Array] = {}
    reasons: dict[str, str] = {}
    metrics: dict[str, dict[str, float]] = {}
    found: dict[str, Statistics] = {}
    if not sequential:
        found = collect_statistics(program, [site for sites in met.values() for site in sites], data, gram=True)
    for target in targets:
        path = target.path
        if sequential:
            found = collect_statistics(program.replace(weights=weights), met[path], data, gram=True)
        seen = [found[site.name] for site in met[path]]
        share = float(shares[path])
        kept = held_matrices(target, earlier[path]) if earlier is not None else None
        assert target.site is not None
        stored = over_columns(target.site, weights[path])
        values, mask, metrics[path] = _pruned(target, stored, pooled(seen, "gram"), share, options, kept)
        after = matrix.stored_weight(target.site, values, program.weights[path])
        masks[path] = target.stored(mask)
        # Pruned elements must be exactly zero in the weight's own dtype.
        after = jnp.where(masks[path], after, jnp.zeros_like(after))
        if stored is not weights[path]:
            after, masks[path] = jax.device_put((after, masks[path]), weights[path].sharding)
        weights[path] = after
        reasons[path] = unseen(seen)
    return with_masks(
        program, plan, "sparsegpt", start, targets, masks, weights=weights, metrics=metrics, reasons=reasons
    )


def _pruned(
    target: Target,
    stored: jax.Array,
    gram: jax.Array,
    sparsity: float,
    options: Options,
    kept: jax.Array | None,
) -> tuple[jax.Array, jax.Array, dict[str, float]]:
    """The pruned `[*steps, B, K, N]`, its mask, and relative errors of the outputs by SparseGPT and by magnitude."""
    exact = target.matrices(stored).astype(jnp.float32)
    plain = exact * _magnitude_mask(target, exact, sparsity, kept).astype(jnp.float32)
    values, mask, squares = _swept(exact, plain, gram, kept, target.pattern, sparsity, options)
    error, plain_error, total = np.sum(np.asarray(squares, np.float64).reshape(-1, 3), axis=0)
    share = lambda part: float(np.sqrt(part / max(total, np.finfo(np.float32).tiny)))  # noqa: E731
    return values, mask, {"output_error": share(error), "magnitude_output_error": share(plain_error)}


@functools.partial(jax.jit, static_argnames=("pattern", "sparsity", "options"))
def _swept(
    exact: jax.Array,
    plain: jax.Array,
    gram: jax.Array,
    kept: jax.Array | None,
    pattern: Pattern,
    sparsity: float,
    options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[*steps, B, K, N]` pruned, the mask, and sums of squares of the outputs' errors, of `plain`'s, of the outputs.

    Compiled once for all weights of one shape.
    """

    def one(weight: jax.Array, plain: jax.Array, gram: jax.Array, kept: jax.Array | None) -> tuple[jax.Array, ...]:
        values, mask = sparsegpt_values(weight, gram, pattern, sparsity, options, kept)
        squares = [output_squares(part, gram) for part in (weight - values, weight - plain, weight)]
        return values, mask, jnp.stack([jnp.sum(part) for part in squares])

    at_once = ELEMENTS_AT_ONCE // exact.shape[-2] ** 2
    return matrix.batched_map(one, exact.shape[:-2], exact, plain, gram, kept, at_once=at_once)


def _magnitude_mask(target: Target, exact: jax.Array, sparsity: float, kept: jax.Array | None) -> jax.Array:
    """The mask of `[*steps, B, K, N]` by magnitudes alone; held elements are zero."""
    if target.pattern.kind == "n_m":
        return _group_mask(exact, kept, target.pattern, sparsity)
    scores = held_last(jnp.abs(exact), kept)
    dropped = round(sparsity * scores[(0,) * target.lead].size)
    return keep_largest_on_host([Ranking([scores], dropped, target.lead)])[0][0]


@functools.partial(jax.jit, static_argnames=("pattern", "sparsity"))
def _group_mask(exact: jax.Array, kept: jax.Array | None, pattern: Pattern, sparsity: float) -> jax.Array:
    return group_masks(held_last(jnp.abs(exact), kept), pattern, sparsity)
