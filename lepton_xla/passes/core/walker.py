"""The one jaxpr walker: a function in, the same function with some of its equations replaced out.

`rewrite` traces a function, then evaluates its equations again through public `jax` calls, letting a pass's rules take
the equations they know. Like `jax.grad` it gives back a function, so it composes with `jit`, `grad`, `vmap`, sharding
and itself. A pass is a rule table; all that has to do with control flow, derivatives and sharding is here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from lepton_xla import _compat
from lepton_xla.errors import UnsupportedError

type Values = list[Any]
type Rule = Callable[["Context", Any, Values], Values | None]
"""`rule(context, equation, operands) -> outputs`, or None to leave the equation as it is."""
type TapName = tuple[str, ...]
type Taps = dict[TapName, jax.Array]


class Carried:
    """What a pass sends through the graph in the place of an array. Subclasses are pytrees of arrays.

    A primitive without a rule for it gets `materialize()`.

    Attributes:
        crosses: whether it may enter the body of a container that is not evaluated in place.
    """

    crosses = True

    def materialize(self) -> jax.Array:
        """The array this stands for."""
        raise NotImplementedError

    def at_step(self, scan: int) -> Carried:
        """This value inside the body of a `scan` over its leading axis (the leaves are already sliced).

        Args:
            scan: identifies the scan.
        """
        del scan
        return self

    def in_specs(self, spec: Any) -> Any:
        """Partition specs of the leaves, a tree like this one or a prefix of it, where the array has `spec`."""
        return spec


def materialize(value: Any) -> Any:
    """The array a value stands for; arrays stand for themselves."""
    return value.materialize() if isinstance(value, Carried) else value


@dataclasses.dataclass(frozen=True)
class Context:
    """Where in the program an equation stands, as a rule sees it.

    Attributes:
        key: identifies the equation and the calls around it: the same each time a body is traced.
        scope: names of the modules and scopes around it, joined by `/`.
        repeats: how often it runs in one call: the product of the lengths of the scans around it.
        container: the innermost container around it, such as `scan` or `shard_map`; empty at the top.
        body: identifies the body that the innermost such container evaluates.
        uses: how often each variable of the jaxpr at hand is read, outputs counted.
    """

    walk: Walk
    key: tuple[int, ...]
    scope: str
    repeats: int
    container: str
    body: tuple[int, ...]
    uses: Mapping[Any, int]
    taps: Taps

    def tap(self, name: TapName, value: jax.Array, combine: Literal["max", "sum"] = "max") -> None:
        """Sends a statistic out of every container around the equation.

        Args:
            name: what the statistic is of, and what it is; one name is combined one way everywhere.
            value: any array; not negative for `max`.
            combine: `max`: `scan` stacks it along a new leading axis; `while`, `cond`, `shard_map` and repeated taps
                take the maximum. `sum`: it is added up over all that runs, and keeps its shape: over the steps of a
                `scan`, the rounds of a `while`, repeated taps, and the devices of a `shard_map` along the mesh axes
                that it varies on (along all of them under `check_vma=False`). A branch not taken counts zero.
        """
        if combine == "sum":
            self.walk.sums.add(name)
        self.taps.update(self.walk.combined(self.taps, {name: value}))

    def bind(self, eqn: Any, values: Sequence[Any]) -> Values:
        """Evaluates the equation as it is, on other operands."""
        return _compat.bind(eqn, [materialize(value) for value in values])


def rewrite(
    fn: Callable[..., Any],
    rules: Mapping[str, Rule] | Callable[[Any], Mapping[str, Rule]],
    *,
    follow: Mapping[str, Rule] | None = None,
    inline: bool = False,
    on_unknown: Literal["error", "keep"] = "error",
    example: Callable[..., tuple[Any, ...]] | None = None,
    prepare: Callable[..., Any] | None = None,
    with_taps: bool = False,
    constant: Callable[[Any], Any] | None = None,
) -> Callable[..., Any]:
    """Transforms a function by replacing equations of its jaxpr.

    Args:
        fn: any function that `jax.make_jaxpr` can trace.
        rules: primitive name -> rule; or a function that makes this table of the jaxpr that is about to be evaluated.
        follow: rules asked only when an operand is `Carried`: how such a value moves through layout operations. The one
            under `"*"` is asked after those, also of equations on literals alone and of containers as a whole.
        inline: False keeps `jit`, `remat`, and custom derivatives as containers, for functions that will be trained;
            True evaluates their bodies in place, for inference.
        on_unknown: what to do with a container the walker does not know that holds a primitive of `rules`.
        example: `example(*args) -> args` to trace `fn` with, where the new function takes other weights than `fn`.
        prepare: `prepare(*args) -> args`, with `Carried` leaves where the pass wants them; same tree as `example`'s.
        with_taps: whether the new function returns `(outputs, taps)`.
        constant: what takes the place of an array that a jaxpr closes over, and of a literal that enters a container;
            the array itself by default.

    Returns:
        A function with the signature of `fn`.

    Raises:
        UnsupportedError: when called, for an unknown container that holds a primitive of `rules`.
    """

    @functools.wraps(fn)
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        traced = example(*args) if example else args
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*traced, **kwargs)
        given = prepare(*args) if prepare else args
        values = jax.tree.leaves((given, kwargs), is_leaf=lambda leaf: isinstance(leaf, Carried))
        table = rules(closed) if callable(rules) else rules
        walk = Walk(table, follow or {}, inline, on_unknown, with_taps, constant)
        outs, taps = walk.call(closed, values, Frame())
        result = jax.tree.unflatten(jax.tree.structure(out_shape), [materialize(out) for out in outs])
        return (result, taps) if with_taps else result

    return rewritten


@dataclasses.dataclass(frozen=True)
class Frame:
    """The calls around a jaxpr."""

    key: tuple[int, ...] = ()
    scope: str = ""
    repeats: int = 1
    container: str = ""
    body: tuple[int, ...] = ()

    def enter(self, eqn: Any, branch: int = 0, repeats: int = 1) -> Frame:
        """The frame of a body of `eqn`."""
        scope = "/".join(part for part in (self.scope, _compat.scope(eqn)) if part)
        name = eqn.primitive.name
        key = (*self.key, id(eqn), branch)
        container, body = (self.container, self.body) if name in _TRANSPARENT else (name, key)
        return Frame(key, scope, self.repeats * repeats, container, body)


class Walk:
    """One evaluation of a jaxpr under one set of rules."""

    def __init__(
        self,
        rules: Mapping[str, Rule],
        follow: Mapping[str, Rule],
        inline: bool,
        on_unknown: str,
        tapped: bool = False,
        constant: Callable[[Any], Any] | None = None,
    ) -> None:
        self.constant = constant
        self.rules = rules
        self.follow = follow
        self.inline = inline
        self.on_unknown = on_unknown
        self.notes: dict[str, Any] = {}  # what rules remember during one evaluation
        self.tapped = tapped
        self.sums: set[TapName] = set()  # names of the taps that are added up
        self._holds: dict[int, str | None] = {}

    def call(self, jaxpr: Any, values: Sequence[Any], frame: Frame) -> tuple[Values, Taps]:
        """Evaluates a jaxpr, dead equations left out; returns outputs, which may be `Carried`, and taps."""
        jaxpr, consts = _compat.open_jaxpr(jaxpr)
        if self.constant is not None:
            consts = [self.constant(value) for value in consts]
        taps: Taps = {}
        equations, _ = _compat.live(jaxpr)
        uses = _count_uses(equations, jaxpr.outvars)
        env: dict[Any, Any] = {}
        read = lambda atom: atom.val if isinstance(atom, _compat.LITERAL) else env[atom]  # noqa: E731
        env.update(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))
        remaining = dict(uses)
        for eqn in equations:
            outs = self._equation(eqn, [read(atom) for atom in eqn.invars], frame, uses, taps)
            env.update(zip(eqn.outvars, outs, strict=True))
            # Values that will not be read again must not outlive this loop when the walk runs on real arrays.
            for atom in eqn.invars:
                if not isinstance(atom, _compat.LITERAL):
                    remaining[atom] -= 1
                    if remaining[atom] == 0:
                        env.pop(atom, None)
        return [read(atom) for atom in jaxpr.outvars], taps

    def _equation(self, eqn: Any, values: Values, frame: Frame, uses: Mapping[Any, int], taps: Taps) -> Values:
        with _compat.equation_context(eqn):
            return self._evaluate(eqn, values, frame, uses, taps)

    def _evaluate(self, eqn: Any, values: Values, frame: Frame, uses: Mapping[Any, int], taps: Taps) -> Values:
        name = eqn.primitive.name
        scope = "/".join(part for part in (frame.scope, _compat.scope(eqn)) if part)
        carried = any(isinstance(value, Carried) for value in values)
        rule = self.rules.get(name) or self.rules.get("*") or (self.follow.get(name) if carried else None)
        asked = [rule] if rule is not None and (name not in _CONTAINERS or name in self.rules) else []
        if "*" in self.follow and (carried or all(isinstance(atom, _compat.LITERAL) for atom in eqn.invars)):
            asked.append(self.follow["*"])
        for rule in asked:
            context = Context(
                self, (*frame.key, id(eqn)), scope, frame.repeats, frame.container, frame.body, uses, taps
            )
            outs = rule(context, eqn, values)
            if outs is not None:
                return outs
        inner = _compat.inner_jaxprs(eqn)
        # A body may hold no equation and still depend on what a pass changes, such as the sizes of what it hands on.
        if inner and (carried or "*" in self.rules or self._site_in(inner)):
            container = _CONTAINERS.get(name)
            if container is not None:
                if name not in _TRANSPARENT:
                    values = [v.materialize() if isinstance(v, Carried) and not v.crosses else v for v in values]
                if self.constant is not None:
                    literal = [isinstance(atom, _compat.LITERAL) for atom in eqn.invars]
                    values = [self.constant(v) if fixed else v for v, fixed in zip(values, literal, strict=True)]
                outs, inner_taps = container(self, eqn, values, frame)
                taps.update(self.combined(taps, inner_taps))
                return outs
            held = self._site_in(inner)
            if held is not None and self.on_unknown == "error":
                raise UnsupportedError(
                    f"{scope or 'the program'}: cannot look inside `{name}`, which holds a `{held}`; move the "
                    f"{held} out of it, or allow it to stay as it is with on_unsupported = 'keep'"
                )
        return _compat.bind(eqn, [materialize(value) for value in values])

    def combined(self, taps: Mapping[TapName, jax.Array], others: Mapping[TapName, jax.Array]) -> Taps:
        """The taps of two parts of a program as one."""
        both = {
            name: taps[name] + value if name in self.sums else jnp.maximum(taps[name], value)
            for name, value in others.items()
            if name in taps
        }
        return {**taps, **others, **both}

    def _site_in(self, jaxprs: Sequence[Any]) -> str | None:
        """The name of a primitive of the rules inside the jaxprs, at any depth."""
        for jaxpr in jaxprs:
            jaxpr, _ = _compat.open_jaxpr(jaxpr)
            if id(jaxpr) not in self._holds:
                self._holds[id(jaxpr)] = self._search(jaxpr)
            if self._holds[id(jaxpr)] is not None:
                return self._holds[id(jaxpr)]
        return None

    def _search(self, jaxpr: Any) -> str | None:
        for eqn in jaxpr.eqns:
            if "*" in self.rules or eqn.primitive.name in self.rules:
                return eqn.primitive.name
            held = self._site_in(_compat.inner_jaxprs(eqn))
            if held is not None:
                return held
        return None


def _count_uses(equations: Sequence[Any], outvars: Sequence[Any]) -> dict[Any, int]:
    uses: dict[Any, int] = {}
    for atom in (*(atom for eqn in equations for atom in eqn.invars), *outvars):
        if not isinstance(atom, _compat.LITERAL):
            uses[atom] = uses.get(atom, 0) + 1
    return uses


# Containers. Each evaluates the bodies of its equation and returns (outputs, taps).


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
        xs = [value.at_step(id(eqn)) if isinstance(value, Carried) else value for value in step]
        outs, taps = walk.call(params["jaxpr"], [*consts, *carry, *xs], inner)
        outs = [materialize(out) for out in outs]
        stacked = {name: value for name, value in taps.items() if name not in walk.sums}
        added = {name: value for name, value in taps.items() if name in walk.sums}
        return outs[:num_carry], (outs[num_carry:], stacked, added)

    def body(state: tuple[Values, Taps], step: Values) -> tuple[tuple[Values, Taps], tuple[Values, Taps]]:
        carry, (ys, stacked, added) = one(state[0], step)
        return (carry, walk.combined(state[1], added)), (ys, stacked)

    none_yet: Taps = {}
    if walk.tapped:  # what is added up is carried along, so its shapes must be known before the first step
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
    batched = answer.shape != ()  # under `vmap`: a row whose own condition is false waits, unchanged, for the others

    def taps_of_test(carry: Values) -> Taps:
        # A condition can hand nothing out of the loop but its answer: where it is tapped, it is evaluated again.
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

    # The recomputation of a derivative that was taken inside the function. Only the parameter keeps XLA from merging
    # it with what it recomputes, and the public function cannot set that.
    def mark(_context: Context, inner: Any, operands: Values) -> Values:
        return _compat.bind(inner, operands, differentiated=True)

    closed, shape = jax.make_jaxpr(checkpointed, return_shape=True)(*values)
    marked = Walk({eqn.primitive.name: mark}, {}, inline=False, on_unknown="keep")
    outs, _ = marked.call(closed, jax.tree.leaves(values), Frame())
    return jax.tree.unflatten(jax.tree.structure(shape), outs)


def _custom_derivative(walk: Walk, eqn: Any, values: Values, frame: Frame) -> tuple[Values, Taps]:
    """The value is the rewritten body's; the derivative stays the one the user wrote for the original."""
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
        # What is the same on all devices of an axis was computed once, as far as the program's meaning goes.
        along = tuple(axis for axis in axes if axis in _compat.varying(value)) if params["check_vma"] else axes
        return lax.psum(value, along)

    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(
            value.in_specs(spec) if isinstance(value, Carried) else spec
            for value, spec in zip(values, params["in_specs"], strict=True)
        ),
        out_specs=(list(params["out_specs"]), jax.P()),
        check_vma=params["check_vma"],
        axis_names=params["newly_manual_axes"],
    )(*values)


def _zeros(taps: Mapping[TapName, Any], drop: int = 0) -> Taps:
    """Zeros like the taps, without their first `drop` axes."""
    return {
        name: _compat.vary(jnp.zeros(value.shape[drop:], value.dtype), _compat.varying(value))
        for name, value in taps.items()
    }


_CONTAINERS: dict[str, Callable[[Walk, Any, Values, Frame], tuple[Values, Taps]]] = {
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

# Containers whose body runs once, on values of the shapes seen outside.
_TRANSPARENT = {
    "jit", "closed_call", "core_call", "eval_jaxpr", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
}  # fmt: skip
