"""Finds masks: scores elements, groups them by pattern, and prunes the lowest of each weight.

Patterns refer to the matrix `[K, N]` of a weight in its product (`passes.core.matrix`), where K is contracted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lepton_xla.errors import RecipeError
from lepton_xla.passes.pruning import held
from lepton_xla.passes.pruning.ranking import LARGEST_RANKING, Masks, Ranking, exact_mean, keep_largest, largest_of_each
from lepton_xla.passes.pruning.targets import Target, split_axis
from lepton_xla.recipe.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Regrowth:
    """Which elements to regrow after some of the kept ones have been pruned.

    Attributes:
        masks: path -> bool array, the elements kept so far.
        scores: path -> float32, not negative; the elements with the highest scores are regrown.
        share: share of the kept elements to replace, a scalar in [0, 1].
    """

    masks: Mapping[str, jax.Array]
    scores: Mapping[str, jax.Array]
    share: Any


def find_masks(
    targets: Sequence[Target],
    scores: Mapping[str, jax.Array],
    sparsity: Mapping[str, Any],
    *,
    rank: Callable[[Sequence[Ranking]], Masks] = keep_largest,
    regrowth: Regrowth | None = None,
    earlier: Mapping[str, jax.Array] | None = None,
    exchange: bool = False,
    spare: bool = False,
) -> dict[str, jax.Array]:
    """Find masks of the elements to keep.

    Elements that earlier masks prune stay pruned and count towards the target. With `regrowth` or `exchange` elements
    may come back, but the number of pruned elements never falls.

    Args:
        targets: the weights and their patterns.
        scores: path -> `element_scores`.
        sparsity: path -> the share to prune: a float, or a float32 scalar inside `jit`. Inside `jit` each weight, and
            each step of a stack, always keeps its largest unit.
        rank: `keep_largest`, or `keep_largest_on_host` outside of `jit`.
        regrowth: which elements to regrow, for patterns other than N:M.
        earlier: path -> bool array, the earlier mask of every target; None if there is none.
        spare: whether weights that are ranked together, and steps of a stack, keep their largest unit outside of `jit`
            too.
        exchange: whether elements that `earlier` prunes may be exchanged for others; inside `jit` only.

    Returns:
        Path -> bool array of the stored weight's shape; False is pruned.
    """
    holds = earlier if regrowth is None and not exchange else None
    found: dict[str, jax.Array] = {}
    sets: dict[Any, list[Target]] = {}
    for target in targets:
        if target.rule.method.startswith("deviation"):
            factor = float(target.rule.method.partition(":")[2])
            weight = target.units(scores[target.path])
            kept = _beyond_deviation(weight, factor, target.lead)
            if isinstance(sparsity[target.path], jax.Array):
                kept = kept | largest_of_each(weight, target.lead)
            found[target.path] = target.spread(kept)
        elif target.pattern.kind == "n_m":
            elements, least = target.matrices(scores[target.path]), None
            if earlier is not None:
                before = held.held_matrices(target, earlier[target.path])
                elements = held.held_last(elements, before) if holds is not None else elements
                least = held.dropped_of_each_group(before, target.pattern.rows) if exchange else None
            kept = group_masks(elements, target.pattern, sparsity[target.path], least=least)
            found[target.path] = target.stored(kept)
        else:
            sets.setdefault(id(target.rule) if _together([target]) else target.path, []).append(target)
    ranked = list(sets.values())
    units = [[target.units(scores[target.path]) for target in each] for each in ranked]
    dropped = [_dropped(each, parts, sparsity[each[0].path], spare) for each, parts in zip(ranked, units, strict=True)]
    leads = [0 if _together(each) else each[0].lead for each in ranked]
    if earlier is not None:
        alive = [[held.held_units(target, earlier[target.path]) for target in each] for each in ranked]
        if holds is not None:
            units = [list(map(held.held_last, *each)) for each in zip(units, alive, strict=True)]
        else:
            dropped = [_no_fewer(*each) for each in zip(ranked, units, dropped, alive, leads, strict=True)]
    if regrowth is None:
        spared = [_sparing(*each, spare=spare) for each in zip(ranked, units, dropped, strict=True)]
        kept = rank([Ranking(*each) for each in zip(spared, dropped, leads, strict=True)]) if ranked else []
    else:
        kept = _regrown(ranked, units, dropped, leads, regrowth, rank)
    for each, masks in zip(ranked, kept, strict=True):
        found |= {target.path: target.spread(mask) for target, mask in zip(each, masks, strict=True)}
    return found if holds is None else {path: mask & holds[path] for path, mask in found.items()}


def _no_fewer(
    targets: Sequence[Target], units: Sequence[jax.Array], dropped: Any, alive: Sequence[jax.Array], lead: int
) -> Any:
    """Number of units to prune in each step: at least those pruned already, and not all."""
    most = Ranking(units, 0, lead).elements - _spared(targets, units)
    before = jnp.minimum(held.dropped_so_far(alive, lead), jnp.uint32(max(0, most)))
    return jnp.maximum(jnp.asarray(dropped, jnp.uint32), before)


def _regrown(
    ranked: Sequence[Sequence[Target]],
    units: Sequence[Sequence[jax.Array]],
    dropped: Sequence[Any],
    leads: Sequence[int],
    regrowth: Regrowth,
    rank: Callable[[Sequence[Ranking]], Masks],
) -> Masks:
    """Keep the best of the kept units except for a share, which the others with the highest scores replace."""
    first: list[Ranking] = []
    second: list[Ranking] = []
    promises: list[list[jax.Array]] = []
    for each, parts, lost, lead in zip(ranked, units, dropped, leads, strict=True):
        active = [target.units(regrowth.masks[target.path].astype(jnp.float32)) > 0 for target in each]
        alive = [jnp.where(on, part, jnp.zeros_like(part)) for on, part in zip(active, parts, strict=True)]
        ranking = Ranking(_sparing(each, alive, lost), lost, lead)
        left = ranking.elements - jnp.asarray(lost, jnp.uint32).astype(jnp.float32)
        replaced = jnp.round(jnp.asarray(regrowth.share, jnp.float32) * left).astype(jnp.uint32)
        most = ranking.elements - (_spared(each, parts) if _together(each) else 0)
        gone = jnp.minimum(jnp.asarray(lost, jnp.uint32) + replaced, jnp.uint32(most))
        first.append(dataclasses.replace(ranking, dropped=gone))
        promises.append([target.units(regrowth.scores[target.path]) for target in each])
    for ranking, kept, promise, lost in zip(first, rank(first), promises, dropped, strict=True):
        certain = [part + jnp.where(on, jnp.float32(jnp.inf), 0) for on, part in zip(kept, promise, strict=True)]
        second.append(Ranking(certain, lost, ranking.lead))
    return rank(second)


def _together(targets: Sequence[Target]) -> bool:
    """Whether weights are ranked together, instead of each step of each weight on its own."""
    return targets[0].rule.distribution == "global"


def _sparing(
    targets: Sequence[Target], units: Sequence[jax.Array], dropped: Any, *, spare: bool = False
) -> list[jax.Array]:
    """Raise the scores of the largest unit of each step of each weight, so that a common ranking never prunes it.

    Outside of `jit` scores are unchanged unless `spare` is set, because there such a rule can be refused.
    """
    if not (_together(targets) and (spare or isinstance(dropped, jax.Array))):
        return list(units)
    spared = [largest_of_each(part, target.lead) for target, part in zip(targets, units, strict=True)]
    return [jnp.where(best, jnp.float32(jnp.inf), part) for best, part in zip(spared, units, strict=True)]


def _spared(targets: Sequence[Target], units: Sequence[jax.Array]) -> int:
    """Number of units of a ranking that are never pruned."""
    if not _together(targets):
        return 1
    return sum(math.prod(part.shape[: target.lead]) for target, part in zip(targets, units, strict=True))


def _dropped(targets: Sequence[Target], units: Sequence[jax.Array], sparsity: Any, spare: bool) -> Any:
    lead = 0 if _together(targets) else targets[0].lead
    count = Ranking(units, 0, lead).elements
    if count > LARGEST_RANKING:
        raise RecipeError(
            f"weight {targets[0].path!r}: {count} elements are too many to rank together; distribution = 'uniform', or "
            f"more blocks in the recipe, make it fewer"
        )
    if isinstance(sparsity, jax.Array):
        share = jnp.clip(sparsity.astype(jnp.float32), 0, 1)
        most = jnp.uint32(max(0, count - _spared(targets, units)))
        return jnp.minimum(jnp.round(share * count).astype(jnp.uint32), most)
    most = max(0, count - _spared(targets, units)) if spare and _together(targets) else count
    return min(round(sparsity * count), most)


def group_masks(scores: jax.Array, pattern: Pattern, sparsity: Any, *, least: jax.Array | None = None) -> jax.Array:
    """Prune the smallest of each `rows` neighbours along K, the first in a tie.

    Args:
        scores: `[..., K, N]`, not negative.
        pattern: `rows` divides K.
        sparsity: requested share; the nearest number of each group is pruned, but at least `kept` are kept.
        least: minimum number to prune in each group, as far as the pattern allows.
    """
    rows = pattern.rows
    if isinstance(sparsity, jax.Array):
        dropped = jnp.clip(jnp.round(sparsity.astype(jnp.float32) * rows), 0, rows - pattern.kept).astype(jnp.int32)
    else:
        dropped = jnp.int32(min(round(sparsity * rows), rows - pattern.kept))
    if least is not None:
        dropped = jnp.minimum(jnp.maximum(dropped, least), rows - pattern.kept)
    return _without_smallest(scores, rows, dropped)


@functools.partial(jax.jit, static_argnames="rows")
def _without_smallest(scores: jax.Array, rows: int, dropped: jax.Array) -> jax.Array:
    """Prune the `dropped` smallest of each `rows` neighbours of `[..., K, N]` along K."""
    keys = split_axis(scores, scores.ndim - 2, rows)
    keys = jnp.where(jnp.isnan(keys), jnp.full_like(keys, jnp.inf), keys)
    place = lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 2)
    before = jnp.zeros(keys.shape, jnp.int32)
    for index in range(rows):
        other = keys[..., index : index + 1, :]
        before = before + ((other < keys) | ((other == keys) & (index < place))).astype(jnp.int32)
    return jnp.reshape(before >= dropped, scores.shape)


@functools.partial(jax.jit, static_argnames=("factor", "lead"))
def _beyond_deviation(weight: jax.Array, factor: float, lead: int) -> jax.Array:
    """Where magnitudes reach `factor` times the standard deviation (Han et al. 2015, arXiv:1506.02626)."""
    axes = tuple(range(lead, weight.ndim))
    positive, negative, square = (
        exact_mean(part, axes, lead) for part in (jnp.maximum(weight, 0), jnp.maximum(-weight, 0), weight * weight)
    )
    mean = positive - negative
    # The barrier prevents a fused multiply-subtract, which would round differently in other programs.
    variance = square - lax.optimization_barrier(mean * mean)
    threshold = jnp.float32(factor) * jnp.sqrt(jnp.maximum(variance, 0))
    return ~(jnp.abs(weight) < jnp.reshape(threshold, threshold.shape + (1,) * len(axes)))
