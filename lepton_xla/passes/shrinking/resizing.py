"""Runs a program on smaller weights: traces the function at the original shapes and evaluates it with adapted ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from lepton_xla import _compat
from lepton_xla.errors import UnsupportedError
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.walker import Context, Rule, Values, materialize
from lepton_xla.passes.shrinking.dependencies import Study, inside
from lepton_xla.passes.shrinking.dimensions import Kept, mask_of
from lepton_xla.passes.shrinking.groups import Groups, Masks, loses, masks_of, transferred
from lepton_xla.passes.shrinking.labels import Axes
from lepton_xla.program import Program
from lepton_xla.trees import abstract


def remove(program: Program, groups: Groups, kept: Kept, *, shapes_only: bool = False) -> Program:
    """Remove units from a program.

    Args:
        program: the program.
        groups: its groups.
        kept: leaf of a group -> which of its units stay, bool `[*steps, units]`.
        shapes_only: whether to return shapes and dtypes instead of weights.
    """
    masks = masks_of(groups.study, kept)
    cut = _cut_shape if shapes_only else cut_array
    weights = {path: cut(weight, masks[path]) if path in masks else weight for path, weight in program.weights.items()}
    cut_masks = {path: _cut(mask, masks[path]) if path in masks else mask for path, mask in program.masks.items()}
    fn = on_smaller_weights(program.fn, abstract(program.weights), masks, list(program.inputs))
    return program.replace(fn=fn, weights=weights, masks=cut_masks)


def cut_array(array: Any, masks: Sequence[np.ndarray | None]) -> jax.Array:
    """Select the slices of an array that stay, on its devices, with the same sharding if the new shape allows it.

    Args:
        array: an array, or a tracer of one.
        masks: for each axis, which positions stay, bool `[*steps, size]`; None if all stay.
    """
    if isinstance(array, jax.Array) and not isinstance(array, Tracer) and not array.is_fully_addressable:
        return jax.jit(lambda whole: _cut(whole, masks))(array)  # other processes hold parts of it
    return _placed(_cut(array, masks), array)


def _cut(weight: Any, masks: Sequence[np.ndarray | None]) -> jax.Array:
    """Select the slices that stay; on the host, because on a device each new shape would be compiled."""
    library: Any = jnp if isinstance(weight, Tracer) else np
    cut = weight if library is jnp else np.asarray(weight)
    for axis, mask in enumerate(masks):
        if mask is None:
            continue
        flat = mask.reshape(-1, mask.shape[mask.ndim - 1])
        indices = np.stack([np.flatnonzero(row) for row in flat])
        if mask.ndim == 1:
            cut = library.take(cut, indices[0], axis=axis)
        else:
            shape = [*mask.shape[:-1], *([1] * (cut.ndim - mask.ndim + 1))]
            shape[axis] = indices.shape[1]
            cut = library.take_along_axis(cut, indices.reshape(shape), axis=axis)
    return jnp.asarray(cut)


def _placed(cut: Any, weight: Any) -> Any:
    """Put a smaller weight on the devices of the original, with the same sharding if its shape allows."""
    sharding = getattr(weight, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(cut, jax.Array):
        return cut
    try:
        sharding.shard_shape(cut.shape)
    except ValueError:
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(cut, sharding)


def _cut_shape(weight: Any, masks: Sequence[np.ndarray | None]) -> jax.ShapeDtypeStruct:
    shape = [
        size if mask is None else int(np.count_nonzero(mask)) // math.prod(mask.shape[:-1])
        for size, mask in zip(weight.shape, masks, strict=True)
    ]
    return jax.ShapeDtypeStruct(tuple(shape), weight.dtype)


def on_smaller_weights(
    fn: Callable[..., Any],
    like: Mapping[str, Any],
    masks: Masks,
    inputs: Sequence[str],
    *,
    keep_outputs: bool = True,
    returned: Sequence[str] = (),
    redrawn: bool = False,
) -> Callable[..., Any]:
    """Make `fn(weights, *inputs)` for weights without the slices that the masks remove.

    Args:
        fn: the function.
        like: shapes and dtypes of the original weights.
        masks: which slices of them stay.
        inputs: names of the inputs.
        keep_outputs, returned, redrawn: as `Study` has them.

    Returns:
        A function that traces `fn` at the original shapes, and the dtypes of its weights, whenever it is traced. It is
        pure, accepts any input sizes, and is as differentiable as `fn`.
    """

    def rules(closed: Any) -> dict[str, Rule]:
        study = Study(closed, like, inputs, keep_outputs=keep_outputs, returned=returned, redrawn=redrawn)
        kept, refusal = transferred(study, masks)
        if refusal:
            raise UnsupportedError(
                f"the program was shrunk at other sizes of its inputs; at these, {refusal}. Protect it when shrinking"
            )

        def adapt(context: Context, eqn: Any, values: Values) -> Values | None:
            change = study.changes.get(context.key)
            constants = [index for index in range(len(values)) if (context.key, index) in study.constants]
            if change is None and not constants:
                return None
            operands = [materialize(value) for value in values]
            for index in constants:
                cut = [mask_of(d, kept) if loses(d, kept) else None for d in study.constants[context.key, index]]
                operands[index] = _cut_constant(operands[index], cut)
            return _compat.bind(eqn, operands, **(change(kept) if change is not None else {}))

        def derived(context: Context, eqn: Any, values: Values) -> Values | None:
            return _with_derivative(context, eqn, values, study.derivatives[context.key], kept)

        def unchanged(context: Context, eqn: Any, values: Values) -> Values:
            return context.bind(eqn, values)  # the analysis treats it as opaque and protects all its inputs

        return {"*": adapt, "custom_jvp_call": derived, "custom_vjp_call": derived, "shard_map": unchanged}

    def whole(weights: Mapping[str, Any], *args: Any) -> tuple[Any, ...]:
        """Arguments for the trace: a training step may compute in fewer bits than the weights are kept in."""
        dtypes = {path: getattr(weights[path], "dtype", leaf.dtype) for path, leaf in like.items()}
        return ({path: jax.ShapeDtypeStruct(leaf.shape, dtypes[path]) for path, leaf in like.items()}, *args)

    return rewrite(fn, rules, on_unknown="keep", example=whole)


def _with_derivative(
    context: Context, eqn: Any, values: Values, axes: Sequence[Axes | None], kept: Kept
) -> Values | None:
    """Adapt a function with a custom derivative to smaller operands, together with its derivative.

    If the derivative cannot be adapted, because it depends on positions that the function does not, the smaller
    function is differentiated instead.
    """
    operands = [materialize(value) for value in values]
    before = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
    if all(value.shape == aval.shape for value, aval in zip(operands, before, strict=False)):
        return None
    count = len(operands)

    def small(*arrays: Any) -> Values:
        jaxpr = eqn.params.get("call_jaxpr") or eqn.params.get("jaxpr")
        return [materialize(out) for out in context.walk.call(jaxpr, arrays, inside(context, eqn))[0]]

    if not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in before):
        return small(*operands)
    names = [str(number) for number in range(len(before))]
    like = {name: jax.ShapeDtypeStruct(aval.shape, aval.dtype) for name, aval in zip(names, before, strict=True)}
    cuts: Masks = {}
    for name, dimensions in zip(names, axes, strict=True):
        if dimensions is not None and any(loses(dimension, kept) for dimension in dimensions):
            cuts[name] = tuple(_first_step(mask_of(d, kept)) if loses(d, kept) else None for d in dimensions)
    given, made = names[:count], names[count:]

    def original(*arrays: Any) -> Values:
        return _compat.bind(eqn, arrays)

    def pushed(arrays: Mapping[str, Any]) -> Values:
        return jax.jvp(original, [arrays[n] for n in given], [arrays[f"{n}'"] for n in given])[1]

    def pulled(arrays: Mapping[str, Any]) -> tuple[Any, ...]:
        return jax.vjp(original, *(arrays[n] for n in given))[1]([arrays[n] for n in made])

    if eqn.primitive.name == "custom_jvp_call":
        shapes = {n: like[n] for n in given} | {f"{n}'": like[n] for n in given}
        masks = {n: cuts[n.rstrip("'")] for n in shapes if n.rstrip("'") in cuts}

        def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Values, Values]:
            arrays = dict(zip(shapes, (*primals, *tangents), strict=True))
            try:
                return small(*primals), on_smaller_weights(pushed, shapes, masks, (), keep_outputs=False)(arrays)
            except UnsupportedError:
                return jax.jvp(small, tuple(primals), tuple(tangents))

        function = jax.custom_jvp(small)
        function.defjvp(rule)
        return function(*operands)

    def pull(residuals: Sequence[Any], cotangents: Sequence[Any]) -> tuple[Any, ...]:
        arrays = dict(zip(names, (*residuals, *cotangents), strict=True))
        try:
            return tuple(on_smaller_weights(pulled, like, cuts, (), keep_outputs=False)(arrays))
        except UnsupportedError:
            return jax.vjp(small, *residuals)[1](list(cotangents))

    differentiable = jax.custom_vjp(small)
    differentiable.defvjp(lambda *arrays: (small(*arrays), arrays), pull)
    return differentiable(*operands)


def _first_step(mask: np.ndarray) -> np.ndarray:
    """The mask of the first step; without constants only the number of units matters."""
    return mask.reshape(-1, mask.shape[mask.ndim - 1])[0]


def _cut_constant(constant: Any, masks: Sequence[np.ndarray | None]) -> jax.Array:
    """Remove slices of a constant. If steps remove different units, the constant is uniform along that axis."""
    return _cut(constant, [_first_step(mask) if mask is not None else None for mask in masks])
