"""Taps: values from inside of a function, by the names of sites and scopes. The function itself is not changed."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax

from lepton_xla.errors import TrainingError
from lepton_xla.passes.core.containers import CONTAINERS
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.sites import Site, operand_value, rewrite_sites
from lepton_xla.passes.core.walker import Context, Rule, TapName, Values, materialize
from lepton_xla.train.distillation.bodies import Attention, Body, attentions, bodies, in_scope, output_of, prefixes

# Containers that a value cannot leave: they do not run once, or they have derivatives of their own.
_CLOSED = {"while", "cond", "shard_map", "custom_jvp_call", "custom_vjp_call"}
_INPUT = ":input"


@dataclasses.dataclass(frozen=True)
class Tap:
    """A value from inside of a function.

    Attributes:
        name: its name, as the user gave it.
        kind: the output or the input of a site, the output of a scope, or the probabilities of an attention.
        place: the site or the scope.
        steps: which step of each surrounding scan, outermost first.
        number: of several attentions in the scope, which one.
    """

    name: str
    kind: Literal["output", "input", "scope", "attention"]
    place: str
    steps: tuple[int, ...]
    number: int | None = None

    @property
    def key(self) -> tuple[bool, str]:
        """Identifies it among the taps of a function: whether it is an attention, and its name."""
        return self.kind == "attention", self.name

    @property
    def tap_name(self) -> TapName:
        """Its name for the walker."""
        return self.kind, self.name


def find_taps(fn: Callable[..., Any], args: Sequence[Any], names: Sequence[str], whose: str) -> tuple[Tap, ...]:
    """Find what names stand for.

    Args:
        fn: `fn(weights, *inputs)`.
        args: shapes of its arguments.
        names: `SITE` (its output), `SITE:input` (the activation that enters it), or `SCOPE` (its last value that is
            used outside of it). A scope may be named by its last parts, such as `layer_1/attention`. Inside a scan,
            `[i]` after the name picks the step.
        whose: whose function it is, for errors.

    Raises:
        TrainingError: if a name is unknown or stands for several scopes.
    """
    if not names:
        return ()
    sites: dict[str, None] = {}

    def record(site: Site, context: Context, eqn: Any, values: Values) -> None:
        del context, eqn, values
        sites[site.name] = None

    jax.eval_shape(rewrite_sites(fn, record, on_unknown="keep"), *args)
    scopes = _scopes(bodies(jax.make_jaxpr(fn)(*args)))

    def found(name: str) -> Tap:
        base, steps = _without_steps(name)
        for text, at in ((name, ()), (base, steps)):
            if text in sites:
                return Tap(name, "output", text, at)
            if text.endswith(_INPUT) and text.removesuffix(_INPUT) in sites:
                return Tap(name, "input", text.removesuffix(_INPUT), at)
        scope = _scope_named(base, scopes, whose)
        if scope is None:
            raise _unknown(name, base, [*sites, *scopes], whose)
        return Tap(name, "scope", scope, steps)

    return tuple(map(found, dict.fromkeys(names)))


def find_attentions(fn: Callable[..., Any], args: Sequence[Any], names: Sequence[str], whose: str) -> tuple[Tap, ...]:
    """Find the attentions that names stand for.

    Args:
        fn: `fn(weights, *inputs)`.
        args: shapes of its arguments.
        names: the scope of an attention, such as `layer_1`; `SCOPE#n` is the n-th in it, from 0, and `#n` that of the
            whole function. Inside a scan, `[i]` after the name picks the step.
        whose: whose function it is, for errors.

    Raises:
        TrainingError: if there is no such attention, or several are in the scope.
    """
    if not names:
        return ()
    within = list(bodies(jax.make_jaxpr(fn)(*args)))
    known = attentions(within)
    scopes = _scopes(within)

    def found(name: str) -> Tap:
        base, steps = _without_steps(name)
        base, _, number = base.partition("#")
        scope = _scope_named(base, scopes, whose) if base else ""
        if scope is None or (number and not number.isdigit()):
            raise _unknown(name, base, scopes, whose)
        tap = Tap(name, "attention", scope, steps, int(number) if number else None)
        _chosen(tap, known, whose)
        return tap

    return tuple(map(found, dict.fromkeys(names)))


def tapped(
    fn: Callable[..., Any], taps: Sequence[Tap], whose: str
) -> Callable[..., tuple[Any, dict[tuple[bool, str], jax.Array]]]:
    """Make the function return `(outputs, values by the keys of taps)`.

    Attentions are `[rows, heads, queries, keys]`.

    Raises:
        TrainingError: when called, if a tap is not in the function, is inside a container that no value can leave, or
            its steps do not fit the scans around it.
    """
    of_scopes = [tap for tap in taps if tap.kind in ("scope", "attention")]
    of_sites = [tap for tap in taps if tap.kind in ("output", "input")]

    def call(*args: Any) -> tuple[Any, dict[tuple[bool, str], jax.Array]]:
        if not taps:
            return fn(*args), {}
        seen = _Seen(whose)
        run = _tap_scopes(fn, of_scopes, seen) if of_scopes else lambda *given: (fn(*given), {})
        both = _tap_sites(run, of_sites, seen) if of_sites else lambda *given: (run(*given), {})
        (outputs, first), second = both(*args)
        values = first | second
        return outputs, {tap.key: seen.value(tap, values) for tap in taps}

    return call


class _Seen:
    """What one trace of a function tells about its taps."""

    def __init__(self, whose: str) -> None:
        self.whose = whose
        self.scans: dict[TapName, int] = {}  # number of scans around a tap
        self.attentions: dict[str, Attention] = {}

    def tap(self, tap: Tap, context: Context, value: Any) -> None:
        closed = [name for name in context.frame.inside if name in _CLOSED]
        if closed:
            raise TrainingError(f"{self.whose}: {tap.name!r} is inside a `{closed[0]}`, which no value can leave")
        self.scans[tap.tap_name] = context.frame.inside.count("scan")
        context.tap(tap.tap_name, materialize(value))

    def value(self, tap: Tap, values: Mapping[TapName, jax.Array]) -> jax.Array:
        if tap.tap_name not in values:
            raise TrainingError(f"{self.whose} computes no {tap.name!r} in training")
        value, scans = values[tap.tap_name], self.scans[tap.tap_name]
        lengths = value.shape[:scans]
        if len(tap.steps) != scans or not all(-size <= at < size for at, size in zip(tap.steps, lengths, strict=True)):
            base = _without_steps(tap.name)[0]
            steps = " times ".join(map(str, lengths))
            raise TrainingError(
                f"{self.whose}: {tap.name!r} is in a scan of {steps} steps; name one, such as {base + '[0]' * scans!r}"
                if scans
                else f"{self.whose}: {tap.name!r} is in no scan; name {base!r}"
            )
        value = value[tap.steps] if scans else value
        return self.attentions[tap.name].arranged(value) if tap.kind == "attention" else value


def _tap_sites(run: Callable[..., Any], taps: Sequence[Tap], seen: _Seen) -> Callable[..., Any]:
    def rule(site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
        mine = [tap for tap in taps if tap.place == site.name]
        if not mine:
            return None
        outs = context.bind(eqn, [operand_value(value) for value in values])
        activation = 0 if site.weight_operand is None else 1 - site.weight_operand
        for tap in mine:
            seen.tap(tap, context, outs[0] if tap.kind == "output" else values[activation])
        return outs

    return rewrite_sites(run, rule, on_unknown="keep", with_taps=True)


def _tap_scopes(run: Callable[..., Any], taps: Sequence[Tap], seen: _Seen) -> Callable[..., Any]:
    def rules(closed: Any) -> dict[str, Rule]:
        within = list(bodies(closed))
        known = attentions(within)
        wanted: dict[tuple[int, ...], list[tuple[Tap, int]]] = {}
        primitives: set[str] = set()
        for tap in taps:
            if tap.kind == "attention":
                attention = _chosen(tap, known, seen.whose)
                seen.attentions[tap.name] = attention
                value = attention.value
            else:
                value = output_of(tap.place, within)
                if value is None:
                    raise TrainingError(f"{seen.whose} computes no {tap.name!r} in training")
            wanted.setdefault(value.key, []).append((tap, value.index))
            primitives.add(value.primitive)

        def rule(context: Context, eqn: Any, values: Values) -> Values | None:
            container = eqn.primitive.name in context.walk.containers
            around = any(key[: len(context.key)] == context.key != key for key in wanted)
            if context.key not in wanted:
                return context.bind(eqn, values) if container and not around else None
            outs = context.enter(eqn, values) if around else context.bind(eqn, values)
            for tap, index in wanted[context.key]:
                seen.tap(tap, context, outs[index])
            return outs

        return dict.fromkeys([*CONTAINERS, *primitives], rule)

    return rewrite(run, rules, on_unknown="keep", with_taps=True)


def _chosen(tap: Tap, known: Sequence[Attention], whose: str) -> Attention:
    """The attention that a tap means.

    Raises:
        TrainingError: if there is none, or several.
    """
    inside = [one for one in known if in_scope(one.scope, tap.place)]
    if tap.number is None and len(inside) == 1:
        return inside[0]
    if tap.number is not None and tap.number < len(inside):
        return inside[tap.number]
    base = tap.place or "the whole function"
    if not inside:
        raise TrainingError(f"{whose}: there is no attention in {tap.name!r}, no softmax that is multiplied by values")
    raise TrainingError(
        f"{whose}: {tap.name!r}: {base} has {len(inside)} attentions; name one, {tap.place}#0 to "
        f"{tap.place}#{len(inside) - 1}"
    )


def _scopes(within: Iterable[Body]) -> list[str]:
    return list(dict.fromkeys(prefix for body in within for scope in body.scopes for prefix in prefixes(scope)))


def _scope_named(name: str, scopes: Iterable[str], whose: str) -> str | None:
    """The scope with this name, or with this end of its name."""
    found = [scope for scope in scopes if scope == name or scope.endswith(f"/{name}")]
    if name in found or len(found) == 1:
        return name if name in found else found[0]
    if found:
        raise TrainingError(f"{whose}: {name!r} may be {' or '.join(map(repr, found[:3]))}; give more of its name")
    return None


def _without_steps(name: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(r"(.*?)((?:\[-?\d+\])*)", name, re.DOTALL)
    assert match is not None
    return match[1], tuple(map(int, re.findall(r"-?\d+", match[2])))


def _unknown(name: str, base: str, known: Sequence[str], whose: str) -> TrainingError:
    near = difflib.get_close_matches(base, known, n=3, cutoff=0.4) or known[:3]
    hint = f"; it has {', '.join(map(repr, near))}" if near else ""
    return TrainingError(f"{whose} has no site or scope {name!r}{hint}")
