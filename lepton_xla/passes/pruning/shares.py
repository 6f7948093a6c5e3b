"""Shares: how much of each weight is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.errors import RecipeError
from lepton_xla.passes.core import matrix
from lepton_xla.passes.pruning.targets import Target
from lepton_xla.recipe.rules import PruneRule, sparsity_of
from lepton_xla.trees import some_names


def something_left(targets: Sequence[Target], *, keep: bool = False) -> dict[str, str]:
    """Refuse rules that would prune a weight entirely, as far as shapes determine that.

    Args:
        targets: the targets of all rules.
        keep: whether to return such weights instead of raising. Weights that are ranked together keep an element then.

    Returns:
        Path -> why the weight cannot be pruned; empty unless `keep`.

    Raises:
        RecipeError: naming the weight.
    """
    reasons: dict[str, str] = {}
    known = [target for target in targets if sparsity_of(target.rule) is not None and target.pattern.kind != "n_m"]
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


def shares(targets: Sequence[Target], sparsity: Any) -> list[Any]:
    """The share to prune of each weight of a rule, so that `sparsity` is the share of all of them.

    Args:
        targets: the targets of one rule.
        sparsity: a float, or a float32 scalar inside `jit`.
    """
    if targets[0].rule.distribution != "erk":
        return [sparsity] * len(targets)
    sizes = [_sizes(target) for target in targets]
    densities = erk_densities([size for size, _ in sizes], [ratio for _, ratio in sizes], sparsity)
    return [1 - density for density in densities]


def rule_shares(targets: Sequence[Target], sparsity: Callable[[PruneRule], Any] | None = None) -> dict[str, Any]:
    """Path -> the share of each weight to prune.

    Args:
        targets: targets of any rules.
        sparsity: the share that each rule prunes of all its weights; by default the rule's own.
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
    """Erdos-Renyi-Kernel densities (Evci et al. 2019, arXiv:1911.11134): the shares to keep; wide weights are sparser.

    Args:
        elements: number of elements of each weight.
        ratios: for each weight, the sum of its dimensions over their product.
        sparsity: of all weights together, a float or a float32 scalar.

    Returns:
        For each weight `min(1, e * ratio)`, with `e` such that all weights together have that sparsity.

    >>> [round(float(density), 3) for density in erk_densities([100, 10_000], [0.2, 0.02], 0.8)]  # 10x10 and 100x100
    [1.0, 0.192]
    """
    library: Any = jnp if isinstance(sparsity, jax.Array) else np
    order = sorted(range(len(ratios)), key=lambda index: -ratios[index])
    size, ratio = (np.asarray([values[index] for index in order], np.float64) for values in (elements, ratios))
    # If the first `j` are kept whole, the others share the rest in proportion to their ratios.
    whole = np.concatenate([[0], np.cumsum(size)[:-1]])
    rest = np.cumsum((size * ratio)[::-1])[::-1]
    total = float(size.sum())
    kind = np.float32 if library is jnp else np.float64
    factors = ((1 - sparsity) * total - whole.astype(kind)) / rest.astype(kind)
    factor = factors[library.argmax(factors * ratio.astype(kind) <= 1 + 1e-6)]
    return [library.minimum(factor * kind(value), kind(1)) for value in ratios]


def _sizes(target: Target) -> tuple[int, float]:
    """Number of elements of a weight, and the sum of its dimensions over their product."""
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


def nothing_left(target: Target, mask: jax.Array) -> str:
    """An error text if a mask prunes a weight, or one of its steps, entirely; else empty."""
    units = np.asarray(target.units(mask.astype(jnp.float32)) if target.lead else mask)
    steps = units.reshape(math.prod(units.shape[: target.lead]), -1)
    if steps.shape[1] == 0 or steps.any(axis=1).all():
        return ""
    return _nothing_left(target)


def _nothing_left(target: Target) -> str:
    what = f"weight {target.path!r} of shape {tuple(target.like.shape)}"
    return f"{what}: {target.rule.describe()} would leave nothing of it"
