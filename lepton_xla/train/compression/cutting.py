"""Cuts the state of a training run like its weights: optimizer moments, masks, averages, trained scales."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lepton_xla.errors import LeptonError, TrainingError
from lepton_xla.passes.core.layouts import lay_out
from lepton_xla.passes.core.matrix import code_matrix
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.sites import stored_weight
from lepton_xla.passes.quantization.fake_quantization import Scales
from lepton_xla.passes.shrinking.groups import Masks
from lepton_xla.passes.shrinking.resizing import cut_array
from lepton_xla.train.state import State
from lepton_xla.trees import abstract, key_name

type _Shapes = Mapping[str, Any]


def cut_state(state: State, optimizer: optax.GradientTransformation, cuts: Masks) -> tuple[State, list[str]]:
    """Cut the state of a run, all but its scales; the other arguments and the results are those of `cut_optimizer`."""
    weights = cut_by_path(state.weights, cuts)
    moments, anew = cut_optimizer(state.optimizer, optimizer, state.weights, weights, cuts)
    small = state.replace(
        weights=weights,
        model_state=cut_by_path(state.model_state, cuts),
        optimizer=moments,
        ema=cut_by_path(state.ema, cuts),
        best=cut_by_path(state.best, cuts),
    )
    return small, anew


def cut_by_path(arrays: Mapping[str, Any], cuts: Masks) -> dict[str, Any]:
    """Cut those arrays whose path has masks."""
    return {path: cut_array(leaf, cuts[path]) if path in cuts else leaf for path, leaf in arrays.items()}


def readable(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return whole arrays that this process can read; those that other processes hold parts of are gathered."""
    found = dict(arrays)
    for path, leaf in arrays.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            whole = leaf
            if isinstance(leaf.sharding, jax.NamedSharding) and not leaf.is_fully_replicated:
                everywhere = jax.NamedSharding(leaf.sharding.mesh, jax.P())
                whole = jax.jit(jnp.copy, out_shardings=everywhere)(leaf)
            found[path] = np.asarray(whole)
    return found


def cut_optimizer(
    state: Any, optimizer: optax.GradientTransformation, before: _Shapes, after: _Shapes, cuts: Masks
) -> tuple[Any, list[str]]:
    """Cut the state of an optimizer.

    A leaf belongs to the weight whose path is the last key on its way that is one. If it has the weight's shape
    (moments, masks, accumulated gradients), it is cut like the weight; if its axes are certainly some of the weight's
    (Adafactor's factored moments), along these. Any other leaf that must change its shape starts anew.

    Args:
        state: the state for the weights before.
        optimizer: the optimizer for the weights after.
        before, after: shapes and dtypes of the weights, by path.
        cuts: which slices of the weights stay.

    Returns:
        The state for the weights after, and a line for each leaf that starts anew.

    Raises:
        TrainingError: if the optimizer cannot take the smaller weights, or its state gets another structure.
    """
    try:
        like = jax.eval_shape(optimizer.init, abstract(after))
    except LeptonError as error:
        raise TrainingError(f"the optimizer cannot go on with the smaller weights: {error}") from error
    flat, tree = jax.tree_util.tree_flatten_with_path(state)
    wanted, tree_after = jax.tree_util.tree_flatten_with_path(like)
    if [path for path, _ in flat] != [path for path, _ in wanted]:
        raise TrainingError(
            f"the optimizer's state has another structure for the smaller weights ({tree_after}) than for the original "
            f"ones ({tree}), so that it cannot be cut"
        )
    leaves: list[Any] = []
    anew: dict[int, str] = {}
    for index, ((path, leaf), (_, want)) in enumerate(zip(flat, wanted, strict=True)):
        owner = next((key for key in map(key_name, reversed(path)) if key in before), None)
        axes = None if owner is None else _axes(leaf, want, before[owner], after[owner])
        if axes is not None:
            masks = [cuts[owner][axis] for axis in axes] if owner in cuts else []
            leaves.append(cut_array(leaf, masks) if any(mask is not None for mask in masks) else leaf)
        elif leaf.shape == want.shape and (owner is None or owner not in cuts or leaf.size <= 1):
            leaves.append(leaf)
        else:
            leaves.append(None)
            anew[index] = f"{'/'.join(map(key_name, path))}: {_shape(leaf)} starts anew as {_shape(want)}"
    if anew:
        fresh = jax.tree.leaves(
            jax.jit(optimizer.init)({path: jnp.zeros(w.shape, w.dtype) for path, w in after.items()})
        )
        leaves = [fresh[index] if index in anew else leaf for index, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree_after, leaves), list(anew.values())


def _axes(leaf: Any, want: Any, before: Any, after: Any) -> tuple[int, ...] | None:
    """The axes of a weight that those of a leaf are, if only one choice fits its shapes before and after."""
    found = [
        [
            axes
            for axes in itertools.combinations(range(len(weight.shape)), len(shape))
            if tuple(weight.shape[axis] for axis in axes) == tuple(shape)
        ]
        for weight, shape in ((before, leaf.shape), (after, want.shape))
    ]
    if not leaf.shape or len(found[0]) != 1 or found[0] != found[1]:
        return None
    return found[0][0]


def _shape(leaf: Any) -> str:
    return f"{jnp.dtype(leaf.dtype).name}[{', '.join(map(str, leaf.shape))}]"


def cut_scales(
    scales: Mapping[str, Any], fresh: Mapping[str, Any], plan: Plan, weights: _Shapes, cuts: Masks
) -> tuple[dict[str, Any], list[str]]:
    """Cut trained scales like the columns of the matrices that they belong to.

    Args:
        scales: `values` before, and the state of their `optimizer`.
        fresh: the same for the smaller weights, for what cannot be cut: scales of groups of rows, and the optimizer.
        plan: the plan of the program before.
        weights: shapes of its weights.
        cuts: which slices of them stay.

    Returns:
        The scales, and a line for what starts anew.
    """
    values, anew = _cut_values(scales["values"], fresh["values"], plan, weights, cuts)
    if jax.tree.map(jnp.shape, values) == jax.tree.map(jnp.shape, scales["values"]):
        return {"values": values, "optimizer": scales["optimizer"]}, anew
    return {"values": values, "optimizer": fresh["optimizer"]}, [*anew, "the optimizer of the scales starts anew"]


def _cut_values(scales: Scales, fresh: Scales, plan: Plan, weights: _Shapes, cuts: Masks) -> tuple[Scales, list[str]]:
    kept: Scales = {}
    anew: list[str] = []
    sites = {str(entry.site.path): entry.site for entry in plan.sites if entry.quantize is not None}
    for name, parts in fresh.items():
        kept[name] = {}
        for part, start in parts.items():
            old = scales[name][part]
            if old.shape != start.shape and name in sites and old.shape[-2] == 1:
                old = _columns(old, code_columns(sites[name], weights, cuts))
            if old.shape != start.shape:
                anew.append(f"scales of {name}: {_shape(scales[name][part])} start anew as {_shape(start)}")
            kept[name][part] = old if old.shape == start.shape else start
    return kept, anew


def code_columns(site: Any, weights: _Shapes, cuts: Masks) -> np.ndarray:
    """Which columns of a site's matrix stay, bool `[*steps, N]`."""
    stays = {path: np.ones(weight.shape, np.float32) for path, weight in weights.items() if path in cuts}
    for path, whole in stays.items():
        for axis, mask in enumerate(cuts[path]):
            if mask is not None:
                shape = [*mask.shape[:-1], *([1] * (whole.ndim - mask.ndim + 1))]
                shape[axis] = mask.shape[mask.ndim - 1]
                whole *= mask.reshape(shape)
    named = {path: jnp.asarray(stays.get(path, np.ones(weight.shape, np.float32))) for path, weight in weights.items()}
    find = lambda step: jnp.any(code_matrix(site, step) > 0, -2)  # noqa: E731
    for _ in range(site.stacked):
        find = jax.vmap(find)
    return np.asarray(find(lay_out(stored_weight(site, named), site.layout)))


def _columns(scale: jax.Array, stays: np.ndarray) -> Any:
    """The scales `[*steps, 1, N]` of the columns that stay."""
    masks: Sequence[Any] = [*([None] * (scale.ndim - 1)), stays]
    counts = stays.sum(-1)
    if scale.shape[-1] != stays.shape[-1] or np.any(counts != counts.reshape(-1)[0]):
        return scale
    return cut_array(scale, masks)
