"""Finds dependency groups in a jaxpr: slices of weights that belong together (Fang et al. 2023, DepGraph).

One walk gives every axis of every value a `Dimension`; primitives unify, flatten, concatenate or protect the dimensions
of their operands. The walk also tracks where a value is zero if a unit's slices of weights are zero: a sum over units,
unless it is a product with a weight, may lose only units that are zero there. So the model without some units always
equals the model in which their slices of weights are zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.passes.core.containers import CONTAINERS
from lepton_xla.passes.core.walker import Context, Frame, Values, Walk
from lepton_xla.passes.shrinking.arithmetic import ARITHMETIC, elementwise
from lepton_xla.passes.shrinking.dimensions import (
    Dimension,
    Scans,
    leaf,
    protect,
    touch,
    unify,
)
from lepton_xla.passes.shrinking.labels import Findings, Handler, Labelled, every, fixed, guard, opaque, pair
from lepton_xla.passes.shrinking.movement import MOVEMENT, random_bits


class Study(Findings):
    """One walk of a jaxpr, which gives every axis of every value a dimension.

    Args:
        jaxpr: of a function whose first arguments are the weights, sorted by path.
        weights: shapes of the weights, by path.
        inputs: names of the other arguments, for messages.
        keep_outputs: whether outputs must keep their shapes.
        returned: paths of the weights whose new values the last outputs are, such as batch statistics in training;
            these lose what the weight loses.
        redrawn: whether fewer random numbers may be drawn, as a loss with dropout does. Otherwise their axes are
            protected, because a smaller draw has other values.
    """

    def __init__(
        self,
        jaxpr: Any,
        weights: Mapping[str, Any],
        inputs: Sequence[str],
        *,
        keep_outputs: bool = True,
        returned: Sequence[str] = (),
        redrawn: bool = False,
    ) -> None:
        super().__init__()
        self.scans: Scans = ()
        self._redrawn = redrawn
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
        outs, _ = Walk(rules, {}, CONTAINERS, inline=True, on_unknown="keep").call(jaxpr, values, Frame())
        own = len(outs) - len(returned)
        for out in outs[:own]:
            if isinstance(out, Labelled) and keep_outputs:
                guard(out.axes, "it is part of the program's output")
        for path, out in zip(returned, outs[own:], strict=True):
            self._return(self.weights[path], out)

    def _return(self, axes: Sequence[Dimension], out: Any) -> None:
        """Unify the axes of a weight with those of the new value that is returned for it."""
        if isinstance(out, Labelled) and len(out.axes) == len(axes):
            for a, b in zip(axes, out.axes, strict=True):
                unify(a, b, "its new value does not line up with it")
        else:
            guard(axes, "its new value is a constant")

    def use(self, values: Sequence[Any]) -> None:
        """Note a use of some values in the surrounding scans."""
        for value in values:
            if isinstance(value, Labelled):
                for dimension in value.axes:
                    touch(dimension, self.scans)

    def _visit(self, context: Context, eqn: Any, values: Values) -> Values:
        operands = [self._labelled(context, eqn, index, value) for index, value in enumerate(values)]
        handler = (
            random_bits if self._redrawn and eqn.primitive.name == "random_bits" else handler_of(eqn.primitive.name)
        )
        outs = handler(self, context, eqn, operands)
        if len(operands) > 1 or handler is not elementwise:  # element-wise operations do not tie steps together
            self.use([*operands, *outs])
        return list(outs)

    def _labelled(self, context: Context, eqn: Any, index: int, value: Any) -> Labelled:
        if isinstance(value, Labelled):
            return value
        if jnp.issubdtype(eqn.invars[index].aval.dtype, jax.dtypes.extended):
            return fixed(eqn.invars[index], "a key of random numbers")
        if _compat.is_traced(value):
            return fixed(eqn.invars[index], "the function closes over it")
        array = np.asarray(value)
        axes = tuple(map(leaf, array.shape))
        if any(size > 1 for size in array.shape):
            self.constants[context.key, index] = axes
            for k, dimension in enumerate(axes):
                if np.any(array != np.take(array, [0], k)):  # uniform constants may be cut
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
        """A value that a loop carries; a constant array as the initial value is protected."""
        return value if isinstance(value, Labelled) else fixed(eqn.invars[index], _constant_in(eqn))

    def _loop(self, eqn: Any, init: list[Labelled], body: Callable[[list[Labelled]], Values]) -> list[Labelled]:
        """Values carried around a loop: equal dimensions in each iteration, and zero only if zero in all."""
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
            joined.append(Labelled(found[0].axes, every(found)))
        self.use([*values, *joined])
        return joined


def inside(context: Context, eqn: Any, branch: int = 0) -> Frame:
    """The frame of a body, with the same key that the walker gives it."""
    return Frame(context.key[:-1]).enter(eqn, branch)


def _constant_in(eqn: Any) -> str:
    return f"a constant array goes through `{eqn.primitive.name}`"


_HANDLERS = ARITHMETIC | MOVEMENT
_INLINED = (
    "jit", "closed_call", "core_call", "eval_jaxpr", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
)  # fmt: skip


def handler_of(name: str) -> Handler:
    """The handler of a primitive."""
    return _HANDLERS.get(name, opaque)
