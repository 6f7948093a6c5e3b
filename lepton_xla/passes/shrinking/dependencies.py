"""Which slices of which weights belong together, found from a jaxpr: dependency groups (Fang et al. 2023, DepGraph).

One walk gives every axis of every value a `Dimension`; what a primitive does to its operands' axes unifies, flattens,
joins or protects them. Besides, it follows where a value is zero if the weights' slices of a unit are: an operation
that sums over units, but is no product with a weight, may lose only units that are zero there. So a model without some
units is always the model in which all of their slices of weights are zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.passes.core.walker import Carried, Context, Frame, Values, Walk
from lepton_xla.passes.shrinking.dimensions import (
    Dimension,
    Kept,
    Scans,
    concat,
    is_protected,
    leaf,
    product,
    protect,
    reshaped,
    size_of,
    split_off,
    touch,
    unify,
)

type Axes = tuple[Dimension, ...]
type Change = Callable[[Kept], dict[str, Any]]
"""The parameters of an equation that must change once some units are gone."""
type Handler = Callable[["Study", Context, Any, list["Labelled"]], list["Labelled"]]


@dataclasses.dataclass(frozen=True)
class Labelled(Carried):
    """What stands for an array in the walk.

    Attributes:
        axes: one dimension an axis.
        zero: for each axis, whether the value is zero at the removed units of that axis.
        path: the weight's path, where this is a weight that was only laid out anew.
        means: dimensions that were summed over to get here, and over how many elements.
    """

    axes: Axes
    zero: tuple[bool, ...]
    path: str | None = None
    means: tuple[tuple[Axes, int], ...] = ()

    def zero_at(self, axis: int) -> bool:
        """Whether the value is zero at the removed units of an axis, or there can be none."""
        return self.zero[axis] or is_protected(self.axes[axis])


@dataclasses.dataclass(frozen=True)
class Product:
    """A product in which a weight takes part.

    Attributes:
        path: the weight's path.
        made: dimensions of the result that come from the weight.
        convolution: whether it is a convolution.
    """

    path: str
    made: Axes
    convolution: bool


class Study:
    """What one walk of a jaxpr found.

    Attributes:
        weights: path -> the dimensions of the weight's axes.
        changes: equation (`Context.key`) -> how its parameters change.
        constants: equation and operand -> the dimensions of the constant array there.
        products: products with a weight, in the order of execution.
        batched: dimensions that a product of two activations is batched over, such as heads.
        scales: dimension and path of each weight vector that an activation is multiplied by.
        derivatives: equation with a derivative of its own -> the dimensions of its operands and results; None for
            constant arrays.
    """

    def __init__(
        self, jaxpr: Any, weights: Mapping[str, Any], inputs: Sequence[str], *, keep_outputs: bool = True
    ) -> None:
        self.weights: dict[str, Axes] = {}
        self.changes: dict[tuple[int, ...], Change] = {}
        self.constants: dict[tuple[tuple[int, ...], int], Axes] = {}
        self.products: list[Product] = []
        self.batched: list[Dimension] = []
        self.scales: list[tuple[Dimension, str]] = []
        self.derivatives: dict[tuple[int, ...], list[Axes | None]] = {}
        self.scans: Scans = ()
        opened, _ = _compat.open_jaxpr(jaxpr)
        values: Values = []
        for path in sorted(weights):
            axes = tuple(map(leaf, weights[path].shape))
            self.weights[path] = axes
            values.append(Labelled(axes, (True,) * len(axes), path))
        for index, var in enumerate(opened.invars[len(values) :]):
            name = inputs[min(index, len(inputs) - 1)]
            values.append(fixed(var, f"it is part of the program's input {name!r}"))
        rules = {"*": self._visit, **dict.fromkeys(_INLINED, self._inlined)}
        rules |= {"scan": self._scan, "while": self._while, "cond": self._cond, "shard_map": self._visit}
        outs, _ = Walk(rules, {}, inline=True, on_unknown="keep").call(jaxpr, values, Frame())
        for out in outs:
            if isinstance(out, Labelled) and keep_outputs:
                guard(out.axes, "it is part of the program's output")

    def use(self, values: Sequence[Any]) -> None:
        """Notes a use of some values in the scans around."""
        for value in values:
            if isinstance(value, Labelled):
                for dimension in value.axes:
                    touch(dimension, self.scans)

    def _visit(self, context: Context, eqn: Any, values: Values) -> Values:
        operands = [self._labelled(context, eqn, index, value) for index, value in enumerate(values)]
        handler = handler_of(eqn.primitive.name)
        outs = handler(self, context, eqn, operands)
        if len(operands) > 1 or handler is not elementwise:  # what looks at one element ties no steps together
            self.use([*operands, *outs])
        return list(outs)

    def _labelled(self, context: Context, eqn: Any, index: int, value: Any) -> Labelled:
        if isinstance(value, Labelled):
            return value
        if jnp.issubdtype(eqn.invars[index].aval.dtype, jax.dtypes.extended):
            return fixed(eqn.invars[index], "a key of random numbers")
        array = np.asarray(value)
        axes = tuple(map(leaf, array.shape))
        if any(size > 1 for size in array.shape):
            self.constants[context.key, index] = axes
            for k, dimension in enumerate(axes):
                if np.any(array != np.take(array, [0], k)):  # one that is the same all along it may be cut anywhere
                    touch(dimension, ())
        return Labelled(axes, (bool(np.all(array == 0)),) * array.ndim)

    def _inlined(self, context: Context, eqn: Any, values: Values) -> Values:
        jaxpr = eqn.params.get("call_jaxpr") or eqn.params.get("jaxpr")
        outs = context.walk.call(jaxpr, values, inside(context, eqn))[0]
        if eqn.primitive.name.startswith("custom"):
            axes = [value.axes if isinstance(value, Labelled) else None for value in (*values, *outs)]
            self.derivatives[context.key] = axes
        return outs

    def _carried(self, eqn: Any, index: int, value: Any) -> Labelled:
        """A value that a loop carries; a constant array there stays as it is."""
        return value if isinstance(value, Labelled) else fixed(eqn.invars[index], _constant_in(eqn))

    def _loop(self, eqn: Any, init: list[Labelled], body: Callable[[list[Labelled]], Values]) -> list[Labelled]:
        """Values carried around a loop: the same dimensions each time, zero only where they are so each time."""
        carry = init
        while True:
            outs = [
                out if isinstance(out, Labelled) else fixed(var, _constant_in(eqn))
                for out, var in zip(body(carry), eqn.outvars, strict=False)
            ]
            for before, after in zip(carry, outs, strict=True):
                pair(before.axes, after.axes, eqn)
            joined = [
                Labelled(before.axes, tuple(x and y for x, y in zip(before.zero, after.zero, strict=True)))
                for before, after in zip(carry, outs, strict=True)
            ]
            if all(before.zero == after.zero for before, after in zip(carry, joined, strict=True)):
                return joined
            carry = joined

    def _scan(self, context: Context, eqn: Any, values: Values) -> Values:
        num_consts, num_carry = _compat.scan_split(eqn)
        split = num_consts + num_carry
        consts = values[:num_consts]
        init = [self._carried(eqn, index, values[index]) for index in range(num_consts, split)]
        scanned = [self._carried(eqn, index, values[index]) for index in range(split, len(values))]
        for value in scanned:
            protect(value.axes[0], "`scan` steps over it")
        self.use([*consts, *init])
        outer = self.scans
        stacked: Values = []

        def body(carry: list[Labelled]) -> Values:
            steps = [Labelled(x.axes[1:], x.zero[1:], x.path) for x in scanned]
            self.scans = (*outer, context.key)
            try:
                outs, _ = context.walk.call(eqn.params["jaxpr"], [*consts, *carry, *steps], inside(context, eqn))
            finally:
                self.scans = outer
            stacked[:] = outs[num_carry:]
            return outs[:num_carry]

        carry = self._loop(eqn, [dataclasses.replace(value, path=None) for value in init], body)
        self.use([*consts, *carry])
        length = leaf(eqn.params["length"], "`scan` steps over it")
        outs: Values = []
        for out, var in zip(stacked, eqn.outvars[num_carry:], strict=True):
            if isinstance(out, Labelled):
                outs.append(Labelled((length, *out.axes), (False, *out.zero)))
            else:
                outs.append(fixed(var, _constant_in(eqn)))
        return [*carry, *outs]

    def _while(self, context: Context, eqn: Any, values: Values) -> Values:
        params = eqn.params
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        init = [self._carried(eqn, index, values[index]) for index in range(split[1], len(values))]

        def body(carry: list[Labelled]) -> Values:
            tested = [*values[: split[0]], *carry]
            context.walk.call(params["cond_jaxpr"], tested, inside(context, eqn, 0))
            stepped = [*values[split[0] : split[1]], *carry]
            return context.walk.call(params["body_jaxpr"], stepped, inside(context, eqn, 1))[0]

        self.use(values)
        return list(self._loop(eqn, [dataclasses.replace(value, path=None) for value in init], body))

    def _cond(self, context: Context, eqn: Any, values: Values) -> Values:
        branches = [
            context.walk.call(jaxpr, values[1:], inside(context, eqn, number))[0]
            for number, jaxpr in enumerate(eqn.params["branches"])
        ]
        joined: Values = []
        for outs, var in zip(zip(*branches, strict=True), eqn.outvars, strict=True):
            found = [out if isinstance(out, Labelled) else fixed(var, _constant_in(eqn)) for out in outs]
            for other in found[1:]:
                pair(found[0].axes, other.axes, eqn)
            joined.append(Labelled(found[0].axes, _every(found)))
        self.use([*values, *joined])
        return joined


def inside(context: Context, eqn: Any, branch: int = 0) -> Frame:
    """The frame of a body, with the key that the walker itself gives it."""
    return Frame(context.key[:-1]).enter(eqn, branch)


def _constant_in(eqn: Any) -> str:
    return f"a constant array goes through `{eqn.primitive.name}`"


def fixed(var: Any, reason: str) -> Labelled:
    """A value none of whose axes may lose anything."""
    return Labelled(tuple(leaf(size, reason) for size in var.aval.shape), (False,) * len(var.aval.shape))


def guard(axes: Sequence[Dimension], reason: str) -> None:
    """Protects several dimensions."""
    for dimension in axes:
        protect(dimension, reason)


def pair(first: Sequence[Dimension], second: Sequence[Dimension], eqn: Any) -> None:
    """Makes the axes of two values the same."""
    for a, b in zip(first, second, strict=True):
        unify(a, b, f"axes that do not line up meet in `{eqn.primitive.name}`")


def _every(values: Sequence[Labelled]) -> tuple[bool, ...]:
    """Where all values are zero."""
    return tuple(all(value.zero_at(axis) for value in values) for axis in range(len(values[0].axes)))


# Handlers: what each primitive makes of its operands' axes.


def opaque(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """Of a primitive about which nothing is known, nothing may change."""
    del study, context
    reason = f"`{eqn.primitive.name}` depends on it"
    for operand in operands:
        guard(operand.axes, reason)
    return [fixed(var, reason) for var in eqn.outvars]


# Element-wise primitives f with f(0) = 0, or f(0, 0) = 0 for two operands.
_ZERO_TO_ZERO = {
    "abs", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bitcast_convert_type", "cbrt", "ceil",
    "conj", "convert_element_type", "copy", "copy_p", "erf", "erf_inv", "expm1", "floor", "imag", "log1p", "max", "min",
    "mulhi", "name", "neg", "or", "pcast", "population_count", "pvary", "real", "reduce_precision", "round",
    "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
}  # fmt: skip
_ELEMENTWISE = _ZERO_TO_ZERO | {
    "acos", "acosh", "bessel_i0e", "bessel_i1e", "clamp", "clz", "complex", "cos", "cosh", "digamma", "div", "eq",
    "eq_to", "erfc", "exp", "exp2", "ge", "gt", "igamma", "igamma_grad_a", "igammac", "integer_pow", "is_finite", "le",
    "le_to", "lgamma", "log", "log2", "logistic", "lt", "lt_to", "mul", "ne", "nextafter", "not", "one_minus_square",
    "polygamma", "pow", "regularized_incomplete_beta", "rem", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "zeta",
}  # fmt: skip


def elementwise(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """All operands have the same axes, but for scalars, and axes of size one that are repeated."""
    del context
    name, sizes = eqn.primitive.name, eqn.outvars[0].aval.shape
    if name in ("mul", "div"):
        _note_scales(study, operands)
        _protect_means(eqn, operands)
    axes: list[Dimension] = []
    zero: list[bool] = []
    for axis, size in enumerate(sizes):
        along = [operand.axes[axis] for operand in operands if operand.axes and operand.axes[axis].size == size]
        for other in along[1:]:
            unify(along[0], other, f"axes that do not line up meet in `{name}`")
        flags = [_flag(operand, atom, axis, size) for operand, atom in zip(operands, eqn.invars, strict=True)]
        axes.append(along[0])
        zero.append(_zero_after(eqn, flags))
    alone = len(operands) == 1
    path = operands[0].path if alone and name in ("convert_element_type", "copy", "copy_p") else None
    return [Labelled(tuple(axes), tuple(zero), path, operands[0].means if alone else ())]


def _flag(operand: Labelled, atom: Any, axis: int, size: Any) -> bool:
    """Whether an operand is zero at the removed units of an axis of the result."""
    if operand.axes and operand.axes[axis].size == size:
        return operand.zero_at(axis)
    return _literal(atom) == 0 if not operand.axes else False


def _zero_after(eqn: Any, flags: list[bool]) -> bool:
    """Whether the result is zero where the operands are so as the flags say."""
    name = eqn.primitive.name
    match name:
        case "mul" | "and":
            return any(flags)
        case "div" | "rem" | "pow" | "shift_left" | "shift_right_arithmetic" | "shift_right_logical":
            return flags[0] and (name != "pow" or (_literal(eqn.invars[1]) or 0) > 0)
        case "integer_pow":
            return flags[0] and eqn.params["y"] > 0
        case "select_n":
            return all(flags[1:])
        case "clamp":
            low, high = _literal(eqn.invars[0]), _literal(eqn.invars[2])
            return flags[1] and low is not None and high is not None and low <= 0 <= high
        case "max" | "min":
            sign = 1 if name == "max" else -1
            bounds = [_literal(atom) for atom in eqn.invars]
            return all(
                flag or (bound is not None and sign * bound <= 0) for flag, bound in zip(flags, bounds, strict=True)
            ) and any(flags)
        case _:
            return name in _ZERO_TO_ZERO and all(flags)


def _literal(atom: Any) -> float | None:
    """The value of a scalar literal."""
    if not isinstance(atom, _compat.LITERAL) or np.ndim(atom.val):
        return None
    value = np.asarray(atom.val)
    return None if np.iscomplexobj(value) else float(value)


def _note_scales(study: Study, operands: list[Labelled]) -> None:
    """Notes a weight vector that an activation is multiplied by."""
    for operand in operands:
        if operand.path is not None:
            wide = [dimension for dimension in study.weights[operand.path] if not is_protected(dimension)]
            study.scales += [(wide[0], operand.path)] if len(wide) == 1 else []


def _protect_means(eqn: Any, operands: list[Labelled]) -> None:
    """Protects what is summed over and divided by the number of its elements, which is a constant of the program."""
    for operand, other in zip(operands, reversed(eqn.invars), strict=True):
        by = _literal(other)
        for axes, count in operand.means:
            if by and math.isclose(by if eqn.primitive.name == "div" else 1 / by, count, rel_tol=1e-2):
                guard(axes, f"a mean over it is divided by the constant {count}")


def _shaped(study: Study, context: Context, outs: list[Labelled], parameter: str) -> list[Labelled]:
    """Notes that a parameter is the shape of the result."""
    study.changes[context.key] = lambda kept: {parameter: tuple(size_of(d, kept) for d in outs[0].axes)}
    return outs


def _reshape(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    operand, sizes = operands[0], eqn.outvars[0].aval.shape
    if eqn.params.get("dimensions") is not None or 0 in sizes:
        return opaque(study, context, eqn, operands)
    axes: list[Dimension | None] = [None] * len(sizes)
    zero = [True] * len(sizes)
    for source, target in blocks([d.size for d in operand.axes], sizes):
        parts = [operand.axes[k] for k in source]
        flag = all(operand.zero_at(k) for k in source)
        why = "a `reshape` cuts across it"
        for k, dimension in zip(target, reshaped(product(parts), [sizes[k] for k in target], why), strict=True):
            axes[k], zero[k] = dimension, flag
    found = tuple(leaf(1) if dimension is None else dimension for dimension in axes)
    out = Labelled(found, tuple(zero), operand.path, operand.means)
    return _shaped(study, context, [out], "new_sizes")


def blocks(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes, sizes of one left out, that a reshape turns into one another."""
    source = [k for k, size in enumerate(before) if size != 1]
    target = [k for k, size in enumerate(after) if size != 1]
    found: list[tuple[list[int], list[int]]] = []
    while source and target:
        pairs = sorted(
            ((p, q) for p in range(1, len(source) + 1) for q in range(1, len(target) + 1)), key=lambda pq: sum(pq)
        )
        p, q = next(
            (
                (p, q)
                for p, q in pairs
                if math.prod(before[k] for k in source[:p]) == math.prod(after[k] for k in target[:q])
            ),
            (len(source), len(target)),
        )
        found.append((source[:p], target[:q]))
        source, target = source[p:], target[q:]
    return found


def _broadcast_in_dim(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    operand, sizes = operands[0], eqn.outvars[0].aval.shape
    nothing = not operand.axes and _literal(eqn.invars[0]) == 0
    axes, zero = [leaf(size) for size in sizes], [nothing] * len(sizes)
    for k, axis in enumerate(eqn.params["broadcast_dimensions"]):
        if operand.axes[k].size == sizes[axis]:
            axes[axis], zero[axis] = operand.axes[k], operand.zero_at(k)
    out = Labelled(tuple(axes), tuple(zero), operand.path, operand.means)
    return _shaped(study, context, [out], "shape")


def _iota(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del operands
    axes = tuple(map(leaf, eqn.outvars[0].aval.shape))
    protect(axes[eqn.params["dimension"]], "`iota` counts along it")
    return _shaped(study, context, [Labelled(axes, (False,) * len(axes))], "shape")


def _transpose(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    return [_taken(operands[0], eqn.params["permutation"])]


def _squeeze(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    gone = {axis % len(operands[0].axes) for axis in eqn.params["dimensions"]}
    return [_taken(operands[0], [k for k in range(len(operands[0].axes)) if k not in gone])]


def _taken(operand: Labelled, order: Sequence[int]) -> Labelled:
    axes, zero = tuple(operand.axes[k] for k in order), tuple(operand.zero[k] for k in order)
    return Labelled(axes, zero, operand.path, operand.means)


def _along(names: str) -> Handler:
    """A handler for what depends on positions along the axes of one parameter, and treats others one by one."""

    def handler(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
        del study, context
        given = eqn.params[names]
        special = {given} if isinstance(given, int) else set(given)
        for operand in operands:
            pair(operands[0].axes, operand.axes, eqn)
        for axis in special:
            protect(operands[0].axes[axis], f"`{eqn.primitive.name}` runs along it")
        zero = _every(operands) if eqn.primitive.name in ("rev", "cumsum") else (False,) * len(operands[0].axes)
        return [Labelled(operands[0].axes, zero) for _ in eqn.outvars]

    return handler


def _reduce(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """Sums may lose units that are zero in them; other reductions lose none."""
    del study, context
    name, operand, gone = eqn.primitive.name, operands[0], eqn.params["axes"]
    for axis in gone:
        if name != "reduce_sum":
            protect(operand.axes[axis], f"`{name}` runs over it")
        elif not operand.zero_at(axis):
            protect(operand.axes[axis], f"`{name}` runs over it where removed units would not be zero")
    kept = [k for k in range(len(operand.axes)) if k not in gone]
    over = tuple(operand.axes[k] for k in gone)
    count = math.prod(d.size for d in over)
    means = ((over, count),) if name == "reduce_sum" and isinstance(count, int) else ()
    passes = name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_or", "reduce_and")
    axes, zero = tuple(operand.axes[k] for k in kept), tuple(passes and operand.zero_at(k) for k in kept)
    return [Labelled(axes, zero, None, means) for _ in eqn.outvars]


def _reduce_window(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """Axes that the window does not span pass."""
    del study, context
    params, operand, sizes = eqn.params, operands[0], eqn.outvars[0].aval.shape
    plain = (1, 1, (0, 0), 1, 1)
    fields = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    arrays = operands[: len(eqn.outvars)]
    for other in arrays[1:]:
        pair(operand.axes, other.axes, eqn)
    axes: list[Dimension] = []
    reason = f"`{eqn.primitive.name}` runs over it"
    for k, dimension in enumerate(operand.axes):
        default = (1,) * len(sizes)
        given = tuple(tuple(v) if isinstance(v := (params.get(f) or default)[k], Sequence) else v for f in fields)
        if given == plain:
            axes.append(dimension)
        else:
            protect(dimension, reason)
            axes.append(leaf(sizes[k], reason))
    zero = tuple(operand.zero_at(k) for k in range(len(axes)))
    passes = eqn.primitive.name in ("reduce_window_sum", "reduce_window_max")
    return [Labelled(tuple(axes), zero if passes else (False,) * len(axes)) for _ in eqn.outvars]


def _dot_general(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    (contract, batch) = eqn.params["dimension_numbers"]
    left, right = operands
    for i, j in zip(*contract, strict=True):
        unify(left.axes[i], right.axes[j], "axes that do not line up meet in `dot_general`")
        if not (left.zero_at(i) or right.zero_at(j)):
            protect(left.axes[i], "`dot_general` sums over it where removed units would not be zero")
    axes: list[Dimension] = []
    zero: list[bool] = []
    for i, j in zip(*batch, strict=True):
        unify(left.axes[i], right.axes[j], "axes that do not line up meet in `dot_general`")
        axes.append(left.axes[i])
        zero.append(left.zero_at(i) or right.zero_at(j))
    free: list[list[int]] = []
    for side, operand in enumerate(operands):
        free.append([k for k in range(len(operand.axes)) if k not in (*contract[side], *batch[side])])
        axes += [operand.axes[k] for k in free[side]]
        zero += [operand.zero_at(k) for k in free[side]]
    paths = [operand.path for operand in operands]
    if paths == [None, None]:
        study.batched += [left.axes[i] for i in batch[0]]
    for side, operand in enumerate(operands):
        if operand.path is not None:
            made = (*free[side], *batch[side])
            study.products.append(Product(operand.path, tuple(operand.axes[k] for k in made), False))
    return [Labelled(tuple(axes), tuple(zero))]


def _ragged_dot_general(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """A product of rows with the matrix of their group, as in a mixture of experts; the groups stay."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    left, right, counts = operands
    if batch[0] or set(numbers.lhs_ragged_dimensions) & set(contract[0]):
        return opaque(study, context, eqn, operands)
    guard([*counts.axes, *(right.axes[k] for k in groups)], "`ragged_dot_general` groups by it")
    guard([left.axes[k] for k in numbers.lhs_ragged_dimensions], "`ragged_dot_general` groups by it")
    for i, j in zip(*contract, strict=True):
        unify(left.axes[i], right.axes[j], "axes that do not line up meet in `ragged_dot_general`")
        if not (left.zero_at(i) or right.zero_at(j)):
            protect(left.axes[i], "`ragged_dot_general` sums over it where removed units would not be zero")
    rows = [k for k in range(len(left.axes)) if k not in contract[0]]
    columns = [k for k in range(len(right.axes)) if k not in (*contract[1], *groups)]
    made = tuple(right.axes[k] for k in columns)
    if right.path is not None:
        study.products.append(Product(right.path, made, False))
    zero = (*(left.zero_at(k) for k in rows), *(right.zero_at(k) for k in columns))
    return [Labelled((*(left.axes[k] for k in rows), *made), zero)]


def _tile(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    axes = tuple(
        product([leaf(count, "`tile` repeats it"), dimension])
        for count, dimension in zip(eqn.params["reps"], operands[0].axes, strict=True)
    )
    return [Labelled(axes, tuple(operands[0].zero_at(k) for k in range(len(axes))))]


def _conv(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    params = eqn.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return opaque(study, context, eqn, operands)
    left, right = operands
    (batch, channels), (made, summed), (out_batch, out_made) = (
        spec[:2] for spec in (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    )
    for operand, spec in ((left, numbers.lhs_spec), (right, numbers.rhs_spec)):
        guard([operand.axes[k] for k in spec[2:]], "a convolution's window runs over it")
    why = "axes that do not line up meet in `conv_general_dilated`"
    group = leaf(groups)
    unify(left.axes[channels], product([group, right.axes[summed]]), why)
    if groups > 1:
        unify(right.axes[made], product([group, leaf(right.axes[made].size // groups)]), why)
        study.changes[context.key] = lambda kept: {"feature_group_count": size_of(group, kept)}
    if not (left.zero_at(channels) or right.zero_at(summed)):
        protect(right.axes[summed], "a convolution sums over it where removed units would not be zero")
    sizes = eqn.outvars[0].aval.shape
    axes = [leaf(size, "a convolution's window runs over it") for size in sizes]
    zero = [False] * len(sizes)
    axes[out_batch], zero[out_batch] = left.axes[batch], left.zero_at(batch)
    axes[out_made], zero[out_made] = right.axes[made], right.zero_at(made)
    if right.path is not None:
        study.products.append(Product(right.path, (right.axes[made],), True))
    return [Labelled(tuple(axes), tuple(zero))]


def _concatenate(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    axis = eqn.params["dimension"]
    for other in operands[1:]:
        for k, (a, b) in enumerate(zip(operands[0].axes, other.axes, strict=True)):
            if k != axis:
                unify(a, b, "axes that do not line up meet in `concatenate`")
    axes = list(operands[0].axes)
    axes[axis] = concat([operand.axes[axis] for operand in operands])
    return [Labelled(tuple(axes), _every(operands))]


def _slice(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    params, operand = eqn.params, operands[0]
    strides = params["strides"] or (1,) * len(operand.axes)
    axes: list[Dimension] = []
    cuts: dict[int, list[Dimension]] = {}  # axis -> what comes before the part that is taken
    for k, (dimension, start, stride) in enumerate(zip(operand.axes, params["start_indices"], strides, strict=True)):
        size = eqn.outvars[0].aval.shape[k]
        if size == dimension.size:
            axes.append(dimension)
            cuts[k] = []
        elif stride != 1 or size == 0 or is_protected(dimension):
            protect(dimension, "`slice` takes every other position of it" if stride != 1 else "`slice` cuts it")
            axes.append(leaf(size, "`slice` cuts it"))
        else:
            head, rest = (None, dimension) if start == 0 else split_off(dimension, start, "`slice` cuts across it")
            cuts[k] = [head] if head is not None else []
            axes.append(rest if rest.size == size else split_off(rest, size, "`slice` cuts across it")[0])

    def change(kept: Kept) -> dict[str, Any]:
        starts, limits = list(params["start_indices"]), list(params["limit_indices"])
        for k, before in cuts.items():
            starts[k] = sum(size_of(head, kept) for head in before)
            limits[k] = starts[k] + size_of(axes[k], kept)
        return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}

    study.changes[context.key] = change
    return [Labelled(tuple(axes), tuple(operand.zero_at(k) for k in range(len(axes))), operand.path)]


def _split(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    operand, axis = operands[0], eqn.params["axis"]
    parts: list[Dimension] = []
    rest = operand.axes[axis]
    for size in eqn.params["sizes"][:-1]:
        part, rest = split_off(rest, size, "`split` cuts across it")
        parts.append(part)
    parts.append(rest)
    study.changes[context.key] = lambda kept: {"sizes": tuple(size_of(part, kept) for part in parts)}
    return [
        Labelled((*operand.axes[:axis], part, *operand.axes[axis + 1 :]), operand.zero, operand.path) for part in parts
    ]


def _pad(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    operand, config = operands[0], eqn.params["padding_config"]
    empty = _literal(eqn.invars[1]) == 0
    axes: list[Dimension] = []
    zero: list[bool] = []
    ends: dict[int, tuple[Dimension, Dimension]] = {}
    padded = any(tuple(entry) != (0, 0, 0) for entry in config)
    for k, (low, high, interior) in enumerate(config):
        dimension = operand.axes[k]
        zero.append(operand.zero_at(k) and (empty or not padded))
        if (low, high, interior) == (0, 0, 0):
            axes.append(dimension)
        elif is_protected(dimension) or interior or low < 0 or high < 0:
            protect(dimension, "`pad` changes it")
            axes.append(leaf(eqn.outvars[0].aval.shape[k], "`pad` changes it"))
        else:
            before, after = leaf(low), leaf(high)
            ends[k] = before, after
            axes.append(concat([before, dimension, after]))

    def change(kept: Kept) -> dict[str, Any]:
        entries = [
            (*(size_of(end, kept) for end in ends[k]), 0) if k in ends else entry for k, entry in enumerate(config)
        ]
        return {"padding_config": tuple(entries)}

    study.changes[context.key] = change
    return [Labelled(tuple(axes), tuple(zero))]


def _gather(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """Axes that are taken whole pass; those that an index points into do not."""
    table, indices = operands
    numbers, slices = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    out, reason = eqn.outvars[0].aval.shape, "`gather` takes positions of it"
    axes: list[Dimension | None] = [None] * len(out)
    zero = [False] * len(out)
    for k, j in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        unify(table.axes[k], indices.axes[j], "axes that do not line up meet in `gather`")
    windows = [
        k for k in range(len(table.axes)) if k not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    ]
    guard([table.axes[k] for k in numbers.collapsed_slice_dims], reason)
    whole: dict[int, Dimension] = {}
    for axis, k in zip(numbers.offset_dims, windows, strict=True):
        if slices[k] == table.axes[k].size:  # an index into it fits at zero only, whatever its size
            axes[axis], zero[axis], whole[k] = table.axes[k], table.zero_at(k), table.axes[k]
        else:
            protect(table.axes[k], reason)
            axes[axis] = leaf(out[axis], reason)
    rest = iter(indices.axes[:-1])
    if indices.axes:
        protect(indices.axes[-1], reason)
    found = tuple(next(rest) if dimension is None else dimension for dimension in axes)
    study.changes[context.key] = lambda kept: {
        "slice_sizes": tuple(size_of(whole[k], kept) if k in whole else size for k, size in enumerate(slices))
    }
    if table.path is not None:
        study.products.append(Product(table.path, tuple(whole.values()), False))
    return [Labelled(found, tuple(zero))]


def _scatter(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """Axes that are written whole pass; those that an index points into do not."""
    del study, context
    target, indices, updates = operands
    numbers, reason = eqn.params["dimension_numbers"], f"`{eqn.primitive.name}` writes to positions of it"
    guard(indices.axes, reason)
    skipped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = [k for k in range(len(target.axes)) if k not in skipped]
    guard([target.axes[k] for k in skipped], reason)
    guard([d for k, d in enumerate(updates.axes) if k not in numbers.update_window_dims], reason)
    zero = [False] * len(target.axes)
    for axis, k in zip(numbers.update_window_dims, windows, strict=True):
        if updates.axes[axis].size == target.axes[k].size and k not in numbers.scatter_dims_to_operand_dims:
            unify(updates.axes[axis], target.axes[k], reason)
            zero[k] = updates.zero_at(axis) and target.zero_at(k)
        else:
            guard([updates.axes[axis], target.axes[k]], reason)
    return [Labelled(target.axes, tuple(zero))]


def _dynamic_slice(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    operand, sizes = operands[0], eqn.outvars[0].aval.shape
    axes: list[Dimension] = []
    for dimension, size in zip(operand.axes, sizes, strict=True):
        if size == dimension.size:
            axes.append(dimension)
        else:
            protect(dimension, "`dynamic_slice` takes positions of it")
            axes.append(leaf(size, "`dynamic_slice` takes positions of it"))
    zero = tuple(operand.zero_at(k) for k in range(len(axes)))
    return _shaped(study, context, [Labelled(tuple(axes), zero, operand.path)], "slice_sizes")


def _dynamic_update_slice(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    target, update, reason = operands[0], operands[1], "`dynamic_update_slice` writes to positions of it"
    for a, b in zip(target.axes, update.axes, strict=True):
        if a.size == b.size:
            unify(a, b, reason)
        else:
            guard([a, b], reason)
    return [Labelled(target.axes, _every([target, update]))]


def _stack(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    for other in operands[1:]:
        pair(operands[0].axes, other.axes, eqn)
    axis, axes, zero = eqn.params["axis"], list(operands[0].axes), list(_every(operands))
    axes.insert(axis, leaf(len(operands), "`stack` makes it"))
    zero.insert(axis, False)
    return [Labelled(tuple(axes), tuple(zero))]


def _unstack(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    axis = eqn.params["axis"]
    protect(operands[0].axes[axis], "`unstack` takes each position of it")
    taken = _taken(operands[0], [k for k in range(len(operands[0].axes)) if k != axis])
    return [taken for _ in eqn.outvars]


def _as_they_are(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context, eqn
    return [Labelled(operand.axes, operand.zero, operand.path) for operand in operands]


def _top_k(study: Study, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    axis = eqn.params.get("axis", len(operands[0].axes) - 1) % len(operands[0].axes)
    axes = list(operands[0].axes)
    protect(axes[axis], "`top_k` ranks along it")
    axes[axis] = leaf(eqn.outvars[0].aval.shape[axis], "`top_k` ranks along it")
    return [Labelled(tuple(axes), (False,) * len(axes)) for _ in eqn.outvars]


_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
    **dict.fromkeys(("device_put", "optimization_barrier"), _as_they_are),
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor",
         "argmax", "argmin"), _reduce,
    ),
    **dict.fromkeys(("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"), _reduce_window),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"), _scatter),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "ragged_dot_general": _ragged_dot_general,
    "reshape": _reshape,
    "rev": _along("dimensions"),
    "slice": _slice,
    "sort": _along("dimension"),
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}  # fmt: skip
_INLINED = (
    "jit", "closed_call", "core_call", "eval_jaxpr", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
)  # fmt: skip


def handler_of(name: str) -> Handler:
    """What is known about a primitive."""
    return _HANDLERS.get(name, opaque)
