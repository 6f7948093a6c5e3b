"""Rules by which the walker evaluates control flow, calls, derivatives and sharding, one per primitive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lepton_xla import _compat
from lepton_xla.errors import UnsupportedError
from lepton_xla.passes.core.walker import (
    ContainerRule,
    Context,
    Frame,
    TapName,
    Taps,
    TracedValue,
    Values,
    Walk,
    materialize,
)


def _inline(walk: Walk, eqn: Any, values: Values, frame: Frame) -> tuple[Values, Taps]:
    jaxpr = eqn.params.get("call_jaxpr") or eqn.params.get("jaxpr")
    return walk.call(jaxpr, values, frame.enter(eqn))


def _jit(walk: Walk, eqn: Any, values: Values, frame: Frame) -> tuple[Values, Taps]:
    params = eqn.params
    in_shardings = _compat.user_shardings(params["in_shardings"])
    out_shardings = _compat.user_shardings(params["out_shardings"])
    if any(layout is not None for layout in (*params["in_layouts"], *params["out_layouts"])):
        raise UnsupportedError(f"jit of `{params['name']}` asks for memory layouts, which a pass cannot keep")
    if walk.inline:
        placed = [_constrain(value, sharding) for value, sharding in zip(values, in_shardings, strict=True)]
        outs, taps = walk.call(params["jaxpr"], placed, frame.enter(eqn))
        return [_constrain(out, sharding) for out, sharding in zip(outs, out_shardings, strict=True)], taps

    def body(*operands: Any) -> tuple[Values, Taps]:
        return walk.call(params["jaxpr"], operands, frame.enter(eqn))

    body.__name__ = params["name"]
    shardings: dict[str, Any] = {}
    if any(sharding is not None for sharding in in_shardings):
        shardings["in_shardings"] = in_shardings
    if any(sharding is not None for sharding in out_shardings):
        shardings["out_shardings"] = (list(out_shardings), None)
    donated = tuple(index for index, flag in enumerate(params["donated_invars"]) if flag)
    options = dict(params["compiler_options_kvs"]) or None
    jitted = jax.jit(
        body,
        donate_argnums=donated,
        keep_unused=params["keep_unused"],
        inline=params["inline"],
        compiler_options=options,
        **shardings,
    )
    return jitted(*values)


def _constrain(value: Any, sharding: Any) -> Any:
    return value if sharding is None else lax.with_sharding_constraint(materialize(value), sharding)


def _scan(walk: Walk, eqn: Any, values: Values, frame: Frame) -> tuple[Values, Taps]:
    params = eqn.params
    num_consts, num_carry = _compat.scan_split(eqn)
    consts = values[:num_consts]
    init = [materialize(value) for value in values[num_consts : num_consts + num_carry]]
    inner = frame.enter(eqn, repeats=params["length"])
    scanned = values[num_consts + num_carry :]

    def one(carry: Values, step: Values) -> tuple[Values, tuple[Values, Taps, Taps]]:
        xs = [value.at_step(id(eqn)) if isinstance(value, TracedValue) else value for value in step]
        outs, taps = walk.call(params["jaxpr"], [*consts, *carry, *xs], inner)
        outs = [materialize(out) for out in outs]
        stacked = {name: value for name, value in taps.items() if name not in walk.sums}
        added = {name: value for name, value in taps.items() if name in walk.sums}
        return outs[:num_carry], (outs[num_carry:], stacked, added)

    def body(state: tuple[Values, Taps], step: Values) -> tuple[tuple[Values, Taps], tuple[Values, Taps]]:
        carry, (ys, stacked, added) = one(state[0], step)
        return (carry, walk.combined(state[1], added)), (ys, stacked)

    none_yet: Taps = {}
    if walk.tapped:  # sums are carried, so their shapes must be known before the first step
        _, (_, _, added) = jax.eval_shape(lambda: lax.scan(one, init, scanned, length=params["length"]))
        none_yet = _zeros(added, drop=1)
    (carry, totals), (ys, taps) = lax.scan(
        body,
        (init, none_yet),
        scanned,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys], taps | totals


def _while(walk: Walk, eqn: Any, values: Values, frame: Frame) -> tuple[Values, Taps]:
    params = eqn.params
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts = values[: split[0]], values[split[0] : split[1]]
    init = [materialize(value) for value in values[split[1] :]]

    def step(carry: Values) -> tuple[Values, Taps]:
        outs, taps = walk.call(params["body_jaxpr"], [*body_consts, *carry], frame.enter(eqn, 1))
        return [materialize(out) for out in outs], taps

    def test(carry: Values) -> tuple[jax.Array, Taps]:
        outs, taps = walk.call(params["cond_jaxpr"], [*cond_consts, *carry], frame.enter(eqn, 0))
        return materialize(outs[0]), taps

    answer, tested = jax.eval_shape(test, init)
    batched = answer.shape != ()  # under `vmap`, a row whose condition is false waits unchanged for the others

    def taps_of_test(carry: Values) -> Taps:
        # A condition can return only its answer, so if it is tapped it is evaluated again outside.
        return test(carry)[1] if tested else {}

    def condition(state: tuple[Values, Taps]) -> jax.Array:
        going, _ = test(state[0])
        return jnp.any(going) if batched else going

    def body(state: tuple[Values, Taps]) -> tuple[Values, Taps]:
        outs, taps = step(state[0])
        if batched:
            going = test(state[0])[0]
            outs = [_select_rows(going, out, before) for out, before in zip(outs, state[0], strict=True)]
        return outs, walk.combined(state[1], walk.combined(taps, taps_of_test(state[0])))

    none_yet = _zeros(jax.eval_shape(step, init)[1] | tested)
    carry, taps = lax.while_loop(condition, body, (init, none_yet))
    return carry, walk.combined(taps, taps_of_test(carry))


def _select_rows(rows: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    return jnp.where(rows.reshape(rows.shape + (1,) * (yes.ndim - rows.ndim)), yes, no)


def _cond(walk: Walk, eqn: Any, values: Values, frame: Frame) -> tuple[Values, Taps]:
    index, operands = values[0], values[1:]

    def branch(number: int, jaxpr: Any) -> Callable[..., tuple[Values, Taps]]:
        def body(*operands: Any) -> tuple[Values, Taps]:
            outs, taps = walk.call(jaxpr, operands, frame.enter(eqn, number))
            return [materialize(out) for out in outs], taps

        return body

    bodies = [branch(number, jaxpr) for number, jaxpr in enumerate(eqn.params["branches"])]
    every: dict[TapName, Any] = {}
    for body in bodies:
        every |= jax.eval_shape(body, *operands)[1]

    def padded(body: Callable[..., tuple[Values, Taps]]) -> Callable[..., tuple[Values, Taps]]:
        def run(*operands: Any) -> tuple[Values, Taps]:
            outs, taps = body(*operands)
            return outs, _zeros(every) | taps

        return run

    return lax.switch(materialize(index), [padded(body) for body in bodies], *operands)


def _remat(walk: Walk, eqn: Any, values: Values, frame: Frame) -> tuple[Values, Taps]:
    if walk.inline:
        return _inline(walk, eqn, values, frame)
    params = eqn.params

    def body(*operands: Any) -> tuple[Values, Taps]:
        return walk.call(params["jaxpr"], operands, frame.enter(eqn))

    checkpointed = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
    if not params["differentiated"]:
        return checkpointed(*values)

    # The recomputation of a derivative that was taken inside the function. Only this parameter keeps XLA from merging
    # it with the original, and the public function cannot set it.
    def mark(_context: Context, inner: Any, operands: Values) -> Values:
        return _compat.bind(inner, operands, differentiated=True)

    closed, shape = jax.make_jaxpr(checkpointed, return_shape=True)(*values)
    marked = Walk({eqn.primitive.name: mark}, {}, walk.containers, inline=False, on_unknown="keep")
    outs, _ = marked.call(closed, jax.tree.leaves(values), Frame())
    return jax.tree.unflatten(jax.tree.structure(shape), outs)


def _custom_derivative(walk: Walk, eqn: Any, values: Values, frame: Frame) -> tuple[Values, Taps]:
    """Evaluate the rewritten body, and keep the user's derivative of the original."""
    if walk.inline:
        return _inline(walk, eqn, values, frame)
    leaves, treedef = jax.tree.flatten(values)

    def original(*arrays: Any) -> Values:
        return _compat.bind(eqn, [materialize(value) for value in jax.tree.unflatten(treedef, arrays)])

    def forward(*arrays: Any) -> Values:
        outs, taps = walk.call(eqn.params["call_jaxpr"], jax.tree.unflatten(treedef, arrays), frame.enter(eqn))
        if taps:
            raise UnsupportedError(f"`{eqn.primitive.name}` cannot be tapped; rewrite with inline=True")
        return [materialize(out) for out in outs]

    if eqn.primitive.name == "custom_jvp_call":
        function = jax.custom_jvp(forward)
        function.defjvp(lambda primals, tangents: (forward(*primals), jax.jvp(original, primals, tangents)[1]))
        return function(*leaves), {}

    def with_residuals(*arrays: Any) -> tuple[Values, Any]:
        return forward(*arrays), jax.vjp(original, *arrays)[1]

    differentiable = jax.custom_vjp(forward)
    differentiable.defvjp(with_residuals, lambda pullback, cotangents: pullback(cotangents))
    return differentiable(*leaves), {}


def _shard_map(walk: Walk, eqn: Any, values: Values, frame: Frame) -> tuple[Values, Taps]:
    params = eqn.params
    axes = tuple(sorted(params["newly_manual_axes"]))

    def body(*operands: Any) -> tuple[Values, Taps]:
        outs, taps = walk.call(params["jaxpr"], operands, frame.enter(eqn))
        return [materialize(out) for out in outs], {name: over_devices(name, value) for name, value in taps.items()}

    def over_devices(name: TapName, value: jax.Array) -> jax.Array:
        if name not in walk.sums:
            return lax.pmax(value, axes)
        # A value that is equal on all devices of an axis counts once.
        along = tuple(axis for axis in axes if axis in _compat.varying(value)) if params["check_vma"] else axes
        return lax.psum(value, along)

    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(
            value.in_specs(spec) if isinstance(value, TracedValue) else spec
            for value, spec in zip(values, params["in_specs"], strict=True)
        ),
        out_specs=(list(params["out_specs"]), jax.P()),
        check_vma=params["check_vma"],
        axis_names=params["newly_manual_axes"],
    )(*values)


def _zeros(taps: Mapping[TapName, Any], drop: int = 0) -> Taps:
    """Zero like the taps, without their first `drop` axes."""
    return {
        name: _compat.vary(jnp.zeros(value.shape[drop:], value.dtype), _compat.varying(value))
        for name, value in taps.items()
    }


CONTAINERS: dict[str, ContainerRule] = {
    "jit": _jit,
    "closed_call": _inline,
    "core_call": _inline,
    "eval_jaxpr": _inline,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat2": _remat,
    "checkpoint": _remat,
    "custom_jvp_call": _custom_derivative,
    "custom_vjp_call": _custom_derivative,
    "shard_map": _shard_map,
}
