"""Which elements of weights are kept: how elements are scored, which are dropped together, and how many of each weight.

Patterns are of the matrix `[K, N]` that a weight is in its product (`passes.core.matrix`): K is what is summed over.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla import _compat
from lepton_xla.errors import ModelError, RecipeError, UnsupportedError
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.sites import LayoutOp, Site, lay_out, layout_key
from lepton_xla.passes.pruning import held
from lepton_xla.passes.pruning.ranking import LARGEST_RANKING, Masks, Ranking, exact_mean, keep_largest, largest_of_each
from lepton_xla.passes.quantization.products import unsupported
from lepton_xla.recipe.patterns import Pattern
from lepton_xla.recipe.rules import DATA_METHODS, PruneRule, sparsity_of
from lepton_xla.trees import some_names

if TYPE_CHECKING:
    from lepton_xla.passes.core.plans import Plan
    from lepton_xla.recipe import PruneRule


@dataclasses.dataclass(frozen=True)
class Target:
    """A weight to be masked.

    Attributes:
        path: the weight's path.
        like: its shape and dtype as stored.
        rule: how.
        site: the product that gives it its matrix; None for a leaf that is known by its path only: its last axis is
            then N, the others K.
    """

    path: str
    like: jax.ShapeDtypeStruct
    rule: PruneRule
    site: Site | None = None

    @property
    def pattern(self) -> Pattern:
        """What is dropped together."""
        return Pattern.parse(self.rule.pattern)

    @property
    def lead(self) -> int:
        """How many leading axes of `units` are steps of scans, each ranked by itself."""
        return self.site.stacked if self.site is not None else 0

    def matrices(self, stored: jax.Array) -> jax.Array:
        """The stored weight, or what belongs to its elements, as `[*steps, B, K, N]`."""
        if self.site is not None:
            return matrix.stored_matrix(self.site, stored)
        return jnp.reshape(stored, (1, -1, stored.shape[-1]))

    def stored(self, mask: jax.Array) -> jax.Array:
        """A mask `[*steps, B, K, N]` in the shape of the stored weight."""
        if self.site is not None:
            return matrix.stored_weight(self.site, mask.astype(jnp.float32), self.like) != 0
        return jnp.reshape(mask, self.like.shape)

    def units(self, scores: jax.Array) -> jax.Array:
        """Scores of what is dropped together, `[*steps, ...]`, from those of the stored weight's elements."""
        pattern = self.pattern
        if pattern.kind == "unstructured":
            return scores if self.site is None else matrix.steps_first(self.site, scores)
        elements = self.matrices(scores)
        if pattern.kind == "channel":
            return exact_mean(elements, (elements.ndim - 2,), self.lead)
        blocks = _split(_split(elements, elements.ndim - 2, pattern.rows), elements.ndim, pattern.columns)
        return exact_mean(blocks, (blocks.ndim - 3, blocks.ndim - 1), self.lead)

    def spread(self, mask: jax.Array) -> jax.Array:
        """The mask of the stored weight's elements, from one of `units`."""
        pattern = self.pattern
        if pattern.kind == "unstructured":
            return mask if self.site is None else matrix.steps_back(self.site, mask, self.like)
        shape = jax.eval_shape(self.matrices, self.like).shape
        if pattern.kind == "channel":
            return self.stored(jnp.broadcast_to(jnp.expand_dims(mask, -2), shape))
        rows = _repeat(mask, mask.ndim - 2, pattern.rows)
        return self.stored(_repeat(rows, mask.ndim - 1, pattern.columns))


def _split(array: jax.Array, axis: int, size: int) -> jax.Array:
    """An axis as two, the second of this size: one at a time, as arrays that carry their sharding want it."""
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    return jnp.reshape(array, (*before, array.shape[axis] // size, size, *after))


def _repeat(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Each element of an axis so many times."""
    before, after = array.shape[: axis + 1], array.shape[axis + 1 :]
    wide = jnp.broadcast_to(jnp.expand_dims(array, axis + 1), (*before, size, *after))
    return jnp.reshape(wide, (*before[:-1], before[-1] * size, *after))


def plan_targets(plan: Plan, weights: Mapping[str, Any]) -> list[Target]:
    """The weights that a plan prunes; one that several sites use is one target, which its first product gives a matrix.

    Raises:
        ModelError: if `weights` lacks one of them, or has it in another shape.
    """
    sites: dict[str, list[Any]] = {}
    for entry in plan.sites:
        if entry.prune is not None and entry.site.path is not None:
            sites.setdefault(entry.site.path, []).append(entry)
    targets: list[Target] = []
    for path, entries in sites.items():
        if path not in weights and (source := entries[0].site.source) is not None:
            raise ModelError(
                f"the plan prunes {path!r}, which is computed from {some_names(source.weights)}: precompute makes a "
                f"weight of it; while training, prune those weights themselves, by rules that name them"
            )
        if path not in weights:
            raise ModelError(
                f"the plan prunes weight {path!r}, which is not among {some_names(weights)}; give the tree of weights "
                f"that the plan's program has"
            )
        site = next((entry.site for entry in entries if entry.site.kind != "gather"), entries[0].site)
        like = jax.ShapeDtypeStruct(weights[path].shape, weights[path].dtype)
        if not _fits(site, like):
            raise ModelError(f"weight {path!r} has shape {like.shape}, which it has not in the plan's program")
        targets.append(Target(path, like, entries[0].prune, site))
    return targets


def _fits(site: Site, like: jax.ShapeDtypeStruct) -> bool:
    """Whether a weight of this shape reaches the site as it did when the site was found."""
    if _compat.is_manual(site.eqn):  # where the site has seen one shard
        return True
    try:
        laid = jax.eval_shape(lambda array: lay_out(array, site.layout), like)
    except (TypeError, ValueError):
        return False
    return laid.shape[site.stacked :] == site.weight.shape


def leaf_targets(rules: Sequence[PruneRule], leaves: Mapping[str, Any]) -> list[Target]:
    """The leaves of a pytree that rules prune, known by their paths only; the first rule that matches one wins.

    Leaves of less than two axes, empty ones, biases and norms' scales of stacked layers or of several heads, and
    embeddings are left out, unless a rule matches nothing else.

    Raises:
        RecipeError: if a rule matches nothing.
        ModelError: if a leaf is not of floats, or empty.
        UnsupportedError: if a pattern does not divide a leaf.
    """
    targets: dict[str, Target] = {}
    for rule in rules:
        matched = [path for path in leaves if rule.matches(path)]
        usual = [path for path in matched if not _left_out(path, leaves)]
        if not matched:
            raise RecipeError(f"sites = {rule.sites!r} matches none of the weights {some_names(leaves)}")
        for path in usual or matched:
            if path not in targets:
                targets[path] = _leaf_target(path, leaves[path], rule)
    return list(targets.values())


# The last names of vectors, which have several axes where layers are stacked or a bias is of several heads.
_VECTORS = {"bias", "b", "scale", "offset", "gain", "gamma", "beta"}
_EMBEDDINGS = {"embedding", "embeddings", "table"}


def _left_out(path: str, leaves: Mapping[str, Any]) -> bool:
    """Whether a leaf is no matrix of a product; a vector's name says so only where the shapes of others agree."""
    module, _, name = path.rpartition("/")
    shape = tuple(leaves[path].shape)
    if len(shape) < 2 or not math.prod(shape) or name in _EMBEDDINGS:
        return True
    if name not in _VECTORS:
        return False

    def has_vector(other: str) -> bool:
        """Whether another leaf, with more axes, is stacked alike, or is of the same module and makes these outputs."""
        wider = tuple(leaves[other].shape)
        stacked = wider[: len(shape) - 1] == shape[:-1]
        same = other.rpartition("/")[0] == module and wider[-len(shape) :] == shape
        return len(wider) > len(shape) and (stacked or same)

    return any(map(has_vector, leaves))


def _leaf_target(path: str, leaf: Any, rule: PruneRule) -> Target:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ModelError(f"weight {path!r} is {leaf.dtype}; only weights of floats are pruned, so exclude it")
    if not math.prod(leaf.shape):
        raise ModelError(f"weight {path!r} of shape {tuple(leaf.shape)} is empty; there is nothing to prune")
    width = leaf.shape[-1] if leaf.shape else 1
    depth = math.prod(leaf.shape) // max(width, 1)
    if reason := _undivided(Pattern.parse(rule.pattern), depth, width, f"{depth} rows"):
        raise UnsupportedError(f"weight {path!r} of shape {tuple(leaf.shape)}: pattern {rule.pattern!r}: {reason}")
    return Target(path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), rule)


def something_left(targets: Sequence[Target], *, keep: bool = False) -> dict[str, str]:
    """Refuses rules that would leave nothing of a weight, as far as that is known from its shape.

    Args:
        targets: of all rules.
        keep: whether such weights are named instead. Of weights that are ranked together something is then left.

    Returns:
        Path -> why it cannot be pruned; empty unless `keep`.

    Raises:
        RecipeError: naming the weight.
    """
    reasons: dict[str, str] = {}
    known = [target for target in targets if sparsity_of(target.rule) is not None and target.pattern.kind != "groups"]
    together: dict[int, list[tuple[Target, int, int]]] = {}
    for target, share in zip(known, rule_shares(known).values(), strict=True):
        units = jax.eval_shape(target.units, jax.ShapeDtypeStruct(target.like.shape, jnp.float32)).shape
        steps, count = math.prod(units[: target.lead]), math.prod(units[target.lead :])
        if target.rule.distribution == "global":
            together.setdefault(id(target.rule), []).append((target, steps, steps * count))
        elif count and round(float(share) * count) >= count:
            if not keep:
                raise RecipeError(f"{_nothing_left(target)}; lower its sparsity or exclude it")
            reasons[target.path] = f"{target.rule.describe()} would leave nothing of it"
    for each in () if keep else together.values():
        rule, kept, count = each[0][0].rule, sum(part[1] for part in each), sum(part[2] for part in each)
        if count and round(float(sparsity_of(rule) or 0) * count) > count - kept:
            raise RecipeError(
                f"sites = {rule.sites!r}: {rule.describe()} would not leave one of each of the weights "
                f"{some_names(part[0].path for part in each)}; lower its sparsity or exclude some"
            )
    return reasons


def unprunable(rule: PruneRule, site: Site, stored: Any, *, named: bool = False) -> str:
    """Why a rule cannot prune a site's weight; empty if it can.

    Args:
        rule: the rule.
        site: the site.
        stored: the weight as the program holds it.
        named: whether the rule is for embeddings and nothing else, which are left out otherwise.
    """
    pattern = Pattern.parse(rule.pattern)
    if site.path is None:
        return "no weight"
    if site.kind == "gather" and not named:
        return "an embedding"
    if stored is None or not jnp.issubdtype(stored.dtype, jnp.floating):
        return f"its weight is {site.weight.dtype if stored is None else stored.dtype}"
    if not math.prod(stored.shape):
        return "its weight is empty"
    if pattern.kind == "unstructured" and rule.method not in DATA_METHODS:
        return "" if matrix.steps_lead(site) or not _resizes(site) else "its weight is cut before its stacked axes lead"
    if site.kind == "gather":
        return f"pattern = {rule.pattern!r} and method = {rule.method!r} are not for embeddings"
    if _compat.is_manual(site.eqn):
        return "it is inside shard_map, where the weight is one shard"
    if _resizes(site):
        return "its weight is broadcast or cut before use, so its matrix is not the whole of it"
    return unsupported(site) or undivided(pattern, site)


def undivided(pattern: Pattern, site: Site) -> str:
    """Why a pattern does not fit the matrix of a site; empty where it does."""
    _, depth, width = matrix.matrix_shape(site)
    window = matrix.window_size(site)
    what = f"{depth // window} input channels" if window > 1 else f"{depth} rows"
    return _undivided(pattern, depth // window, width, what)


def _undivided(pattern: Pattern, depth: int, width: int, what: str) -> str:
    if depth % pattern.rows:
        return f"groups of {pattern.rows} do not divide its {what}"
    if width % pattern.columns:
        return f"blocks of {pattern.columns} columns do not divide its {width} output channels"
    return ""


def other_matrix(rule: PruneRule, sites: Sequence[Site]) -> str:
    """Why sites cannot share one mask: their weight is another matrix for one of them; empty if they can."""
    if rule.pattern == "unstructured" and rule.method not in DATA_METHODS:
        return ""
    keys = [(layout_key(site.layout), site.kind, str(site.params["dimension_numbers"])) for site in sites]
    differs = next((site for site, key in zip(sites, keys, strict=True) if key != keys[0]), None)
    return f"its weight is used in another layout at {differs.name!r}" if differs is not None else ""


def shares(targets: Sequence[Target], sparsity: Any) -> list[Any]:
    """The share of each weight of one rule that is dropped, so that `sparsity` is that of them all.

    Args:
        targets: of one rule.
        sparsity: a float, or a float32 scalar inside `jit`.
    """
    if targets[0].rule.distribution != "erk":
        return [sparsity] * len(targets)
    sizes = [_sizes(target) for target in targets]
    densities = erk_densities([size for size, _ in sizes], [ratio for _, ratio in sizes], sparsity)
    return [1 - density for density in densities]


def rule_shares(targets: Sequence[Target], sparsity: Callable[[PruneRule], Any] | None = None) -> dict[str, Any]:
    """Path -> the share of each weight that is dropped.

    Args:
        targets: of any rules.
        sparsity: what each rule drops of all its weights; by default what the rule itself says.
    """
    rules: dict[int, list[Target]] = {}
    for target in targets:
        rules.setdefault(id(target.rule), []).append(target)
    found: dict[str, Any] = {}
    for each in rules.values():
        asked = sparsity_of(each[0].rule) if sparsity is None else sparsity(each[0].rule)
        found |= {target.path: share for target, share in zip(each, shares(each, asked), strict=True)}
    return found


def erk_densities(elements: Sequence[int], ratios: Sequence[float], sparsity: Any) -> list[Any]:
    """Erdos-Renyi-Kernel shares of what is kept (Evci et al. 2019, arXiv:1911.11134): all but the widest are sparser.

    Args:
        elements: of each weight.
        ratios: of each: the sum of its dimensions over their product.
        sparsity: of all together, a float or a float32 scalar.

    Returns:
        For each weight `min(1, e * ratio)`, with the `e` at which all together have that sparsity.
    """
    library: Any = jnp if isinstance(sparsity, jax.Array) else np
    order = sorted(range(len(ratios)), key=lambda index: -ratios[index])
    size, ratio = (np.asarray([values[index] for index in order], np.float64) for values in (elements, ratios))
    # With the first `j` kept whole, the others share what is left in the proportion of their ratios.
    whole = np.concatenate([[0], np.cumsum(size)[:-1]])
    rest = np.cumsum((size * ratio)[::-1])[::-1]
    total = float(size.sum())
    kind = np.float32 if library is jnp else np.float64
    factors = ((1 - sparsity) * total - whole.astype(kind)) / rest.astype(kind)
    factor = factors[library.argmax(factors * ratio.astype(kind) <= 1 + 1e-6)]
    return [library.minimum(factor * kind(value), kind(1)) for value in ratios]


def _sizes(target: Target) -> tuple[int, float]:
    """Elements of a weight, and the sum of its dimensions over their product."""
    if target.site is None:
        dimensions = target.like.shape
    elif target.site.kind == "conv_general_dilated":
        out, inner, *window = target.site.params["dimension_numbers"].rhs_spec
        dimensions = [target.site.weight.shape[axis] for axis in (out, inner, *window)]
    elif target.site.kind == "dot_general":
        dimensions = matrix.matrix_shape(target.site)[1:]
    else:
        dimensions = target.site.weight.shape
    return math.prod(target.like.shape), sum(dimensions) / math.prod(dimensions)


def element_scores(
    target: Target, weight: jax.Array, *, gradient: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """What each element of a stored weight is worth by the rule's method, float32; signed for `deviation` only.

    Raises:
        RecipeError: for a method that needs what is not there.
    """
    method = target.rule.method
    if method.startswith("deviation"):
        return weight.astype(jnp.float32)
    if method == "magnitude":
        return jnp.abs(weight.astype(jnp.float32))
    if method == "saliency" and gradient is not None:
        return jnp.abs(weight.astype(jnp.float32) * gradient.astype(jnp.float32))
    if method == "random" and key is not None:  # what is zero already goes first
        return random_scores(target, key) * (weight != 0).astype(jnp.float32)
    raise RecipeError(f"weight {target.path!r}: method = {method!r} {_ELSEWHERE.get(method, 'is not known here')}")


_ELSEWHERE = {
    "saliency": "needs gradients: train with lx.train.sparsify",
    **dict.fromkeys(DATA_METHODS, "prunes a trained model once, with calibration data: use lx.optimize"),
}


def random_scores(target: Target, key: jax.Array) -> jax.Array:
    """Random scores of the stored weight's elements, of which none is zero: the same for the same key and path."""
    own = jax.random.fold_in(key, zlib.crc32(target.path.encode()))
    return jax.random.uniform(own, target.like.shape, jnp.float32, minval=jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Regrowth:
    """Elements to take back in after some of those that were kept have been dropped.

    Attributes:
        masks: path -> bool array: what has been kept so far.
        scores: path -> float32, not negative: what each element promises.
        share: of those kept, how many are replaced: a scalar in [0, 1].
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
    """Masks of the elements to keep.

    What earlier masks drop stays dropped and counts towards the share. With `regrowth` or `exchange` elements may come
    back; then no fewer are dropped than before.

    Args:
        targets: which weights, and in which patterns.
        scores: path -> `element_scores`.
        sparsity: path -> the share to drop: a float, or a float32 scalar inside `jit`, where one unit of each weight,
            and of each step of a stack, is always left: its largest.
        rank: `keep_largest`, or `keep_largest_on_host` outside of `jit`.
        regrowth: what is taken back in, for patterns other than N:M.
        earlier: path -> bool array, the mask of every target so far; None where there is none.
        spare: whether outside of `jit` too one unit of each weight that is ranked with others, and of each step of a
            stack, is left.
        exchange: whether others may be dropped in the place of those that `earlier` drops; inside `jit` only.

    Returns:
        Path -> bool array of the stored weight's shape; False is dropped.
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
        elif target.pattern.kind == "groups":
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
    """How many units of each step are dropped, at least as many as are so already, and something of each left."""
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
    """Keeps the best of what was kept so far, but for a share of it, which the most promising of the rest replace."""
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
    """Whether weights are ranked together, and not each step of each by itself."""
    return targets[0].rule.distribution == "global"


def _sparing(
    targets: Sequence[Target], units: Sequence[jax.Array], dropped: Any, *, spare: bool = False
) -> list[jax.Array]:
    """Scores by which, of weights that are ranked together, the largest unit of each step of each is never dropped.

    Outside of `jit` they stay as they are unless `spare` says otherwise: there it can be refused.
    """
    if not (_together(targets) and (spare or isinstance(dropped, jax.Array))):
        return list(units)
    spared = [largest_of_each(part, target.lead) for target, part in zip(targets, units, strict=True)]
    return [jnp.where(best, jnp.float32(jnp.inf), part) for best, part in zip(spared, units, strict=True)]


def _spared(targets: Sequence[Target], units: Sequence[jax.Array]) -> int:
    """How many units of one ranking are never dropped."""
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
    """Drops the smallest of each `rows` neighbours along K, of equal ones those that come first.

    Args:
        scores: `[..., K, N]`, not negative.
        pattern: `rows` divides K.
        sparsity: the share asked for: the nearest number of each group, but at least `kept` are kept.
        least: how many of each group are dropped whatever is asked for, as far as the pattern allows.
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
    """Drops so many of each `rows` neighbours of `[..., K, N]` along K."""
    keys = _split(scores, scores.ndim - 2, rows)
    keys = jnp.where(jnp.isnan(keys), jnp.full_like(keys, jnp.inf), keys)
    place = lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 2)
    before = jnp.zeros(keys.shape, jnp.int32)
    for index in range(rows):
        other = keys[..., index : index + 1, :]
        before = before + ((other < keys) | ((other == keys) & (index < place))).astype(jnp.int32)
    return jnp.reshape(before >= dropped, scores.shape)


@functools.partial(jax.jit, static_argnames=("factor", "lead"))
def _beyond_deviation(weight: jax.Array, factor: float, lead: int) -> jax.Array:
    """Whether magnitudes reach `factor` times the standard deviation (Han et al. 2015, arXiv:1506.02626)."""
    axes = tuple(range(lead, weight.ndim))
    positive, negative, square = (
        exact_mean(part, axes, lead) for part in (jnp.maximum(weight, 0), jnp.maximum(-weight, 0), weight * weight)
    )
    mean = positive - negative
    # A product of its own: contracted with the subtraction, it would round differently in another program.
    variance = square - lax.optimization_barrier(mean * mean)
    threshold = jnp.float32(factor) * jnp.sqrt(jnp.maximum(variance, 0))
    return ~(jnp.abs(weight) < jnp.reshape(threshold, threshold.shape + (1,) * len(axes)))


def nothing_left(target: Target, mask: jax.Array) -> str:
    """Why a mask would leave nothing of a weight, or of one of its steps; empty where it leaves something."""
    units = np.asarray(target.units(mask.astype(jnp.float32)) if target.lead else mask)
    steps = units.reshape(math.prod(units.shape[: target.lead]), -1)
    if steps.shape[1] == 0 or steps.any(axis=1).all():
        return ""
    return _nothing_left(target)


def _nothing_left(target: Target) -> str:
    what = f"weight {target.path!r} of shape {tuple(target.like.shape)}"
    return f"{what}: {target.rule.describe()} would leave nothing of it"


def _resizes(site: Site) -> bool:
    return any(op.resizes for op in site.layout if isinstance(op, LayoutOp))
