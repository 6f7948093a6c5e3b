"""Targets: the weights to prune, in their stored shape and as the matrices that patterns refer to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.errors import ModelError, RecipeError, UnsupportedError
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.layouts import lay_out
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.sites import Site
from lepton_xla.passes.pruning.ranking import exact_mean
from lepton_xla.recipe.patterns import Pattern
from lepton_xla.recipe.rules import PruneRule
from lepton_xla.trees import some_names


@dataclasses.dataclass(frozen=True)
class Target:
    """A weight to prune.

    Attributes:
        path: the weight's path.
        like: its shape and dtype as stored.
        rule: how to prune it.
        site: the product that defines its matrix; None for a leaf that is known by its path only, whose last axis is N
            and whose other axes are K.
    """

    path: str
    like: jax.ShapeDtypeStruct
    rule: PruneRule
    site: Site | None = None

    @property
    def pattern(self) -> Pattern:
        """The pattern of the rule."""
        return Pattern.parse(self.rule.pattern)

    @property
    def lead(self) -> int:
        """Number of leading axes of `units` that are steps of scans, each ranked on its own."""
        return self.site.stacked if self.site is not None else 0

    def matrices(self, stored: jax.Array) -> jax.Array:
        """Reshape the stored weight, or an array of its shape, to `[*steps, B, K, N]`."""
        if self.site is not None:
            return matrix.stored_matrix(self.site, stored)
        return jnp.reshape(stored, (1, -1, stored.shape[-1]))

    def stored(self, mask: jax.Array) -> jax.Array:
        """Reshape a mask `[*steps, B, K, N]` to the stored weight."""
        if self.site is not None:
            return matrix.stored_weight(self.site, mask.astype(jnp.float32), self.like) != 0
        return jnp.reshape(mask, self.like.shape)

    def units(self, scores: jax.Array) -> jax.Array:
        """Scores of units (elements that are pruned together), `[*steps, ...]`, from scores of the stored elements."""
        pattern = self.pattern
        if pattern.kind == "unstructured":
            return scores if self.site is None else matrix.steps_first(self.site, scores)
        elements = self.matrices(scores)
        if pattern.kind == "channel":
            return exact_mean(elements, (elements.ndim - 2,), self.lead)
        blocks = split_axis(split_axis(elements, elements.ndim - 2, pattern.rows), elements.ndim, pattern.columns)
        return exact_mean(blocks, (blocks.ndim - 3, blocks.ndim - 1), self.lead)

    def spread(self, mask: jax.Array) -> jax.Array:
        """Expand a mask of `units` to the elements of the stored weight."""
        pattern = self.pattern
        if pattern.kind == "unstructured":
            return mask if self.site is None else matrix.steps_back(self.site, mask, self.like)
        shape = jax.eval_shape(self.matrices, self.like).shape
        if pattern.kind == "channel":
            return self.stored(jnp.broadcast_to(jnp.expand_dims(mask, -2), shape))
        rows = _repeat(mask, mask.ndim - 2, pattern.rows)
        return self.stored(_repeat(rows, mask.ndim - 1, pattern.columns))


def split_axis(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Split an axis in two, the second of this size; one axis at a time, as explicit sharding requires."""
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    return jnp.reshape(array, (*before, array.shape[axis] // size, size, *after))


def _repeat(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Repeat each element of an axis."""
    before, after = array.shape[: axis + 1], array.shape[axis + 1 :]
    wide = jnp.broadcast_to(jnp.expand_dims(array, axis + 1), (*before, size, *after))
    return jnp.reshape(wide, (*before[:-1], before[-1] * size, *after))


def plan_targets(plan: Plan, weights: Mapping[str, Any]) -> list[Target]:
    """The weights that a plan prunes. A weight that several sites share is one target, with the matrix of its first
    product.

    Raises:
        ModelError: if `weights` lacks one of them, or has it in another shape.
    """
    targets: list[Target] = []
    for path, entries in plan.pruned.items():
        if path not in weights:
            raise ModelError(
                f"the plan prunes weight {path!r}, which is not among {some_names(weights)}; give the tree of weights "
                f"that the plan's program has"
            )
        site = next((entry.site for entry in entries if entry.site.kind != "gather"), entries[0].site)
        like = jax.ShapeDtypeStruct(weights[path].shape, weights[path].dtype)
        if not _fits(site, like):
            raise ModelError(f"weight {path!r} has shape {like.shape}, which it has not in the plan's program")
        rule = entries[0].prune
        assert rule is not None
        targets.append(Target(path, like, rule, site))
    return targets


def _fits(site: Site, like: jax.ShapeDtypeStruct) -> bool:
    """Whether a weight of this shape reaches the site in the same way as when the site was found."""
    if _compat.is_manual(site.eqn):  # the site has seen one shard only
        return True
    try:
        laid = jax.eval_shape(lambda array: lay_out(array, site.layout), like)
    except (TypeError, ValueError):
        return False
    return laid.shape[site.stacked :] == site.weight.shape


def leaf_targets(rules: Sequence[PruneRule], leaves: Mapping[str, Any]) -> list[Target]:
    """The leaves of a pytree that rules prune, identified by their paths only; the first rule that matches wins.

    Skips leaves with fewer than two axes, empty leaves, embeddings, and biases and norm scales of stacked layers or
    several heads, unless a rule matches nothing else.

    Raises:
        RecipeError: if a rule matches nothing.
        ModelError: if a leaf is not float, or is empty.
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


# Last names of vectors, which have several axes if layers are stacked or a bias has several heads.
_VECTORS = {"bias", "b", "scale", "offset", "gain", "gamma", "beta"}


_EMBEDDINGS = {"embedding", "embeddings", "table"}


def _left_out(path: str, leaves: Mapping[str, Any]) -> bool:
    """Whether a leaf is not the matrix of a product; a vector's name counts only if other shapes agree."""
    module, _, name = path.rpartition("/")
    shape = tuple(leaves[path].shape)
    if len(shape) < 2 or not math.prod(shape) or name in _EMBEDDINGS:
        return True
    if name not in _VECTORS:
        return False

    def has_vector(other: str) -> bool:
        """Whether another leaf with more axes is stacked alike, or makes these outputs in the same module."""
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
    """Why a pattern does not fit the matrix of a site; empty if it does."""
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
