"""The jaxpr walker, which evaluates a function with some of its equations replaced.

`rewrite` traces a function and evaluates its equations again through public `jax` calls; the rules of a pass replace
the equations that they match. Like `jax.grad` it returns a function, so it composes with `jit`, `grad`, `vmap`,
sharding and itself. A pass is a table of rules; control flow, derivatives and sharding are handled here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.errors import UnsupportedError

type Values = list[Any]
# `rule(context, equation, operands) -> outputs`, or None to leave the equation unchanged.
type Rule = Callable[["Context", Any, Values], Values | None]
# `rule(walk, equation, operands, frame) -> (outputs, taps)` evaluates the bodies of a container.
type ContainerRule = Callable[["Walk", Any, Values, "Frame"], tuple[Values, Taps]]
type TapName = tuple[str, ...]
type Taps = dict[TapName, jax.Array]


class TracedValue:
    """A value that a pass sends through the graph instead of an array. Subclasses are pytrees of arrays.

    Primitives without a rule for it get `materialize()`.

    Attributes:
        crosses: whether it may enter the body of a container that is not inlined.
    """

    crosses = True

    def materialize(self) -> jax.Array:
        """The array that this stands for."""
        raise NotImplementedError

    def at_step(self, scan: int) -> TracedValue:
        """Convert to a value inside the body of a `scan` over the leading axis; the leaves are already sliced.

        Args:
            scan: identifies the scan.
        """
        del scan
        return self

    def in_specs(self, spec: Any) -> Any:
        """Partition specs of the leaves, as a tree or a prefix of one, if the array has `spec`."""
        return spec


def materialize(value: Any) -> Any:
    """Return the array that a value stands for; arrays are returned unchanged."""
    return value.materialize() if isinstance(value, TracedValue) else value


@dataclasses.dataclass(frozen=True)
class Context:
    """The place of an equation in the program, passed to rules.

    Attributes:
        key: identifies the equation and its surrounding calls; the same each time a body is traced.
        scope: names of the surrounding modules and scopes, joined by `/`.
        frame: the surrounding calls.
        uses: number of reads of each variable of the current jaxpr, outputs included.
    """

    walk: Walk
    key: tuple[int, ...]
    scope: str
    frame: Frame
    uses: Mapping[Any, int]
    taps: Taps

    @property
    def repeats(self) -> int:
        """Number of runs in one call: the product of the lengths of the surrounding scans."""
        return self.frame.repeats

    @property
    def container(self) -> str:
        """The innermost surrounding container, such as `scan` or `shard_map`; empty at the top level."""
        return self.frame.container

    @property
    def body(self) -> tuple[int, ...]:
        """Identifies the body of that container."""
        return self.frame.body

    def tap(self, name: TapName, value: jax.Array, combine: Literal["max", "sum"] = "max") -> None:
        """Send a statistic out of all surrounding containers.

        Args:
            name: the name of the statistic; a name must be combined in the same way everywhere.
            value: any array; not negative for `max`.
            combine: `max`: `scan` stacks it along a new leading axis; `while`, `cond`, `shard_map` and repeated taps
                take the maximum. `sum`: it keeps its shape and is summed over the steps of a `scan`, the iterations of
                a `while`, repeated taps, and the devices of a `shard_map` along the mesh axes on which it varies (all
                axes under `check_vma=False`). A branch that is not taken counts zero.
        """
        if combine == "sum":
            self.walk.sums.add(name)
        self.taps.update(self.walk.combined(self.taps, {name: value}))

    def bind(self, eqn: Any, values: Sequence[Any]) -> Values:
        """Evaluate the unchanged equation on other operands."""
        return _compat.bind(eqn, [materialize(value) for value in values])

    def enter(self, eqn: Any, values: Values) -> Values:
        """Evaluate a container, the rules applied inside, as the walker does where no rule takes it."""
        outs, taps = self.walk.containers[eqn.primitive.name](self.walk, eqn, values, self.frame)
        self.taps.update(self.walk.combined(self.taps, taps))
        return outs


@dataclasses.dataclass(frozen=True)
class Frame:
    """The surrounding calls of a jaxpr; `inside` names all of them, outermost first."""

    key: tuple[int, ...] = ()
    scope: str = ""
    repeats: int = 1
    container: str = ""
    body: tuple[int, ...] = ()
    inside: tuple[str, ...] = ()

    def enter(self, eqn: Any, branch: int = 0, repeats: int = 1) -> Frame:
        """The frame of a body of `eqn`."""
        scope = "/".join(part for part in (self.scope, _compat.scope(eqn)) if part)
        name = eqn.primitive.name
        key = (*self.key, id(eqn), branch)
        container, body = (self.container, self.body) if name in TRANSPARENT else (name, key)
        return Frame(key, scope, self.repeats * repeats, container, body, (*self.inside, name))


class Walk:
    """One evaluation of a jaxpr under one set of rules."""

    def __init__(
        self,
        rules: Mapping[str, Rule],
        follow: Mapping[str, Rule],
        containers: Mapping[str, ContainerRule],
        inline: bool,
        on_unknown: str,
        tapped: bool = False,
        constant: Callable[[Any], Any] | None = None,
    ) -> None:
        self.constant = constant
        self.rules = rules
        self.follow = follow
        self.containers = containers
        self.inline = inline
        self.on_unknown = on_unknown
        self.notes: dict[str, Any] = {}  # memory of rules during one evaluation
        self.tapped = tapped
        self.sums: set[TapName] = set()  # names of the taps that are summed
        self._holds: dict[int, str | None] = {}

    def call(self, jaxpr: Any, values: Sequence[Any], frame: Frame) -> tuple[Values, Taps]:
        """Evaluate a jaxpr without its dead equations; return outputs, which may be `TracedValue`, and taps."""
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
            # When the walk runs on real arrays, free values after their last use.
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
        carried = any(isinstance(value, TracedValue) for value in values)
        rule = self.rules.get(name) or self.rules.get("*") or (self.follow.get(name) if carried else None)
        asked = [rule] if rule is not None and (name not in self.containers or name in self.rules) else []
        if "*" in self.follow and (carried or all(isinstance(atom, _compat.LITERAL) for atom in eqn.invars)):
            asked.append(self.follow["*"])
        for rule in asked:
            context = Context(self, (*frame.key, id(eqn)), scope, frame, uses, taps)
            outs = rule(context, eqn, values)
            if outs is not None:
                return outs
        inner = _compat.inner_jaxprs(eqn)
        # A body without equations may still depend on changes of a pass, such as the sizes of values that it passes on.
        if inner and (carried or "*" in self.rules or self._site_in(inner)):
            container = self.containers.get(name)
            if container is not None:
                if name not in TRANSPARENT:
                    values = [v.materialize() if isinstance(v, TracedValue) and not v.crosses else v for v in values]
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
        """Combine the taps of two parts of a program."""
        both = {
            name: taps[name] + value if name in self.sums else jnp.maximum(taps[name], value)
            for name, value in others.items()
            if name in taps
        }
        return {**taps, **others, **both}

    def _site_in(self, jaxprs: Sequence[Any]) -> str | None:
        """The name of a primitive inside the jaxprs, at any depth, that has a rule; None if there is none."""
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


# Containers whose body runs once, on values of the same shapes as outside.
TRANSPARENT = {
    "jit", "closed_call", "core_call", "eval_jaxpr", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
}  # fmt: skip
