"""Targets: the weights to be masked, as stored and as the matrices that patterns are of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.errors import ModelError, RecipeError, UnsupportedError
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.sites import Site, lay_out
from lepton_xla.passes.pruning.ranking import exact_mean
from lepton_xla.recipe.patterns import Pattern
from lepton_xla.recipe.rules import PruneRule
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
        blocks = split_axis(split_axis(elements, elements.ndim - 2, pattern.rows), elements.ndim, pattern.columns)
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


def split_axis(array: jax.Array, axis: int, size: int) -> jax.Array:
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
