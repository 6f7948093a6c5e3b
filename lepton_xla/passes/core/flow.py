"""Finds weights that can absorb a factor on the channels of a value without changing the program's results.

The program is flattened to equations, except for control flow, and followed backwards from a product's activation,
through operations that commute with a per-channel factor, to the weights that can absorb it: the scale and shift of a
norm, or the output channels of the preceding product and its bias.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.passes.core.names import SiteNames
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.sites import takes_rows
from lepton_xla.passes.core.walker import Context, Values
from lepton_xla.program import Program, probe_sizes
from lepton_xla.trees import abstract, name_leaves

_MOVES = (
    "convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "copy", "copy_p", "reduce_precision",
    "sharding_constraint",
)  # fmt: skip
_SPREADS = (*_MOVES, "broadcast_in_dim")
_BODIES = ("scan", "while", "cond")


class NotAbsorbedError(Exception):
    """A factor cannot be absorbed; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A weight on its way through layout operations.

    Attributes:
        path: the weight's path.
        steps: the bodies of the scans that step over it.
        turned: whether a transpose was among the operations.
        not_float: the first dtype on its way that is no float and cannot hold a factor; empty if there is none.
    """

    path: str
    steps: tuple[int, ...] = ()
    turned: bool = False
    not_float: str = ""


@dataclasses.dataclass(frozen=True)
class Absorber:
    """A weight that can absorb a factor.

    Attributes:
        path: the weight's path.
        axis: for the weight of a product, the operand's axis of the factor; None for a vector.
        site: the name of that product.
    """

    path: str
    axis: int | None = None
    site: str = ""


@dataclasses.dataclass(eq=False)
class Place:
    """A product in the flattened program: its name, equation, weight operand, and body."""

    name: str
    eqn: Any
    weight_operand: int
    source: Source
    body: Body


class Body:
    """One jaxpr of the flattened program: the producer and the readers of each variable."""

    def __init__(self, jaxpr: Any, sources: Mapping[Any, Source]) -> None:
        self.sources = dict(sources)
        self.producers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
        self.readers: dict[Any, list[Any]] = {}
        for eqn in jaxpr.eqns:
            for atom in eqn.invars:
                if not isinstance(atom, _compat.LITERAL):
                    self.readers.setdefault(atom, []).append(eqn)
        for atom in jaxpr.outvars:
            if not isinstance(atom, _compat.LITERAL):
                self.readers.setdefault(atom, []).append(None)

    def source(self, atom: Any) -> Source | None:
        """The weight that a variable is, up to layout operations; None for anything else."""
        turned, not_float = False, ""
        while not isinstance(atom, _compat.LITERAL):
            not_float = not_float_name(atom.aval.dtype) or not_float
            if atom in self.sources:
                found = self.sources[atom]
                return dataclasses.replace(found, turned=found.turned or turned, not_float=found.not_float or not_float)
            eqn = self.producers.get(atom)
            if eqn is None or eqn.primitive.name not in _SPREADS:
                return None
            turned = turned or eqn.primitive.name == "transpose"
            atom = eqn.invars[0]
        return None

    def lies_along(self, operand: Any, axis: int) -> bool:
        """Whether a weight, after its layout operations, varies along this axis of a variable only."""
        while operand not in self.sources:
            eqn = self.producers[operand]
            if eqn.primitive.name == "broadcast_in_dim":
                places = eqn.params["broadcast_dimensions"]
                if axis not in places:
                    return False
                axis = places.index(axis)
            else:
                try:
                    axis = _moved_back(eqn, axis)
                except NotAbsorbedError:
                    return False
            operand = eqn.invars[0]
        shape = operand.aval.shape
        return shape[axis] == math.prod(shape)


def not_float_name(dtype: Any) -> str:
    """The name of a dtype if it is no float; else empty."""
    return "" if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(dtype).name


class Flow:
    """A program flattened to equations.

    Attributes:
        places: product name -> its place, for products of a weight and an activation.
        uses: weight path -> number of reads in the program.
    """

    def __init__(self, program: Program) -> None:
        self.places: dict[str, Place] = {}
        self.uses: dict[str, int] = {}
        self.weights = program.weights
        self._names = SiteNames(name_leaves(program.weights))

        def leave(_context: Context, _eqn: Any, _values: Values) -> None:
            return None

        sizes = probe_sizes(program.fn, program.weights, program.inputs)[0]
        flat = rewrite(program.fn, {"*": leave}, inline=True, on_unknown="keep")
        closed = jax.make_jaxpr(flat)(abstract(program.weights), *program.abstract_inputs(sizes))
        jaxpr, _ = _compat.open_jaxpr(closed)
        # Weights come first, in the order in which JAX flattens a dict: by key.
        names = [name for name in sorted(program.weights) for _ in jax.tree.leaves(program.weights[name])]
        plain = {name for name, leaf in program.weights.items() if isinstance(leaf, jax.Array)}
        pairs = zip(names, jaxpr.invars, strict=False)
        self._read(jaxpr, {var: Source(name) for name, var in pairs if name in plain})

    def _read(self, jaxpr: Any, sources: Mapping[Any, Source]) -> None:
        body = Body(jaxpr, sources)
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            found = [body.source(atom) for atom in eqn.invars]
            if name in _BODIES:
                self._count(found[index] for index in _changing(eqn))
                for inner, inner_sources in _inner(eqn, found):
                    self._read(inner, inner_sources)
                continue
            if name in _SPREADS and found[0] is not None:
                continue
            self._count(found)
            self._note(body, eqn, found)
        self._count(body.source(atom) for atom in jaxpr.outvars)

    def _count(self, found: Iterable[Source | None]) -> None:
        for source in found:
            if source is not None:
                self.uses[source.path] = self.uses.get(source.path, 0) + 1

    def _note(self, body: Body, eqn: Any, found: Sequence[Source | None]) -> None:
        kind = eqn.primitive.name
        if kind not in ("dot_general", "conv_general_dilated", "ragged_dot_general", "gather"):
            return
        tracked = [(operand, source) for operand, source in enumerate(found[:2]) if source is not None]
        if len(tracked) != 1 or (kind == "gather" and (tracked[0][0] != 0 or not takes_rows(eqn))):
            return
        operand, source = tracked[0]
        name = self._names.of_weight(source.path)
        self.places[name] = Place(name, eqn, operand, source, body)

    def activation(self, place: Place) -> tuple[Any, int]:
        """The variable behind a product's activation, before layout operations, and the axis of its input channels.

        Raises:
            NotAbsorbedError: if the input channels are not a single axis throughout.
        """
        eqn, side = place.eqn, 1 - place.weight_operand
        if eqn.primitive.name == "conv_general_dilated":
            axis = eqn.params["dimension_numbers"].lhs_spec[1]
        else:
            contract, batch = eqn.params["dimension_numbers"]
            if len(contract[side]) != 1 or batch[side]:
                raise NotAbsorbedError("its inputs are several axes")
            axis = contract[side][0]
        var = eqn.invars[side]
        while (maker := place.body.producers.get(var)) is not None and maker.primitive.name in _MOVES:
            if not jnp.issubdtype(maker.invars[0].aval.dtype, jnp.floating):
                break
            axis = _moved_back(maker, axis)
            var = maker.invars[0]
        return var, axis

    def readers(self, body: Body, var: Any) -> list[Any]:
        """The equations that read a variable, through layout operations; None stands for an output of the body."""
        found: list[Any] = []
        for eqn in body.readers.get(var, []):
            if eqn is not None and eqn.primitive.name in _MOVES:
                found += self.readers(body, eqn.outvars[0])
            else:
                found.append(eqn)
        return found

    def absorb(self, place: Place, var: Any, axis: int) -> list[Absorber]:
        """The weights that can absorb a factor on an axis of a variable, such that only the variable's readers see it.

        Raises:
            NotAbsorbedError: if no weight on some path can absorb it.
        """
        body = place.body
        if var not in body.producers:
            raise NotAbsorbedError("its activation comes from outside" + (" of the scan" if place.source.steps else ""))
        eqn = body.producers[var]
        name = eqn.primitive.name
        size = var.aval.shape[axis]

        def further(operand: Any, at: int) -> list[Absorber]:
            if isinstance(operand, _compat.LITERAL) or operand.aval.ndim <= at or operand.aval.shape[at] != size:
                raise NotAbsorbedError(f"a `{name}` before it has an operand without channels")
            if body.source(operand) is not None:
                return [self._vector(place, operand, at, size)]
            if any(reader is not eqn for reader in body.readers[operand]) or len(body.readers[operand]) > 1:
                raise NotAbsorbedError(f"what the `{name}` before it reads is also read elsewhere")
            return self.absorb(place, operand, at)

        if name in _MOVES:
            if not jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating):
                raise NotAbsorbedError("integers stand before it")
            return further(eqn.invars[0], _moved_back(eqn, axis))
        if name in ("add", "sub"):
            return [*further(eqn.invars[0], axis), *further(eqn.invars[1], axis)]
        if name in ("mul", "div"):
            sides = sorted(range(2 if name == "mul" else 1), key=lambda k: body.source(eqn.invars[k]) is None)
            return _first([lambda k=k: further(eqn.invars[k], axis) for k in sides])
        if name == "max" and _zero(eqn.invars[1]):
            return further(eqn.invars[0], axis)
        if name == "neg":
            return further(eqn.invars[0], axis)
        if name in ("reduce_sum", "reduce_max") and body.source(eqn.invars[0]) is None:
            kept = [k for k in range(eqn.invars[0].aval.ndim) if k not in eqn.params["axes"]]
            return further(eqn.invars[0], kept[axis])
        if name in ("reduce_window_max", "reduce_window_sum") and eqn.params["window_dimensions"][axis] == 1:
            return further(eqn.invars[0], axis)
        if name in ("dot_general", "conv_general_dilated"):
            return [self._columns(place, eqn, axis)]
        raise NotAbsorbedError(f"a `{name}` stands before it")

    def _columns(self, place: Place, eqn: Any, axis: int) -> Absorber:
        before = next((other for other in self.places.values() if other.eqn is eqn), None)
        if before is None:
            raise NotAbsorbedError(f"a `{eqn.primitive.name}` of two activations stands before it")
        self._check(place, before.source)
        at = output_axis(eqn, before.weight_operand, axis)
        if at is None:
            raise NotAbsorbedError("its channels are rows of the product before it")
        return Absorber(before.source.path, at, before.name)

    def _vector(self, place: Place, operand: Any, axis: int, size: int) -> Absorber:
        source = place.body.source(operand)
        assert source is not None
        self._check(place, source)
        if not is_vector(self.weights[source.path], place.body, operand, axis):
            raise NotAbsorbedError(f"{source.path!r} is not a vector of its channels")
        return Absorber(source.path)

    def _check(self, place: Place, source: Source) -> None:
        if source.not_float:
            raise NotAbsorbedError(f"{source.path!r} is {source.not_float}, which holds no factor")
        if self.uses.get(source.path, 0) != 1:
            raise NotAbsorbedError(f"{source.path!r} is also used elsewhere")
        if source.steps != place.source.steps:
            raise NotAbsorbedError(f"{source.path!r} is not stacked as its weight is")


def is_vector(stored: Any, body: Body, operand: Any, axis: int) -> bool:
    """Whether a weight is stored as a vector (one per step) that varies along one axis of a variable."""
    source, size = body.source(operand), operand.aval.shape[axis]
    if source is None or source.turned or not body.lies_along(operand, axis):
        return False
    rest = stored.shape[len(source.steps) :]
    return math.prod(rest) == size and max((*rest, 1)) == size


def output_axis(eqn: Any, weight_operand: int, axis: int) -> int | None:
    """The axis of a product's weight operand that an axis of its result stems from; None if it stems from the other."""
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        return numbers.rhs_spec[0] if weight_operand == 1 and axis == numbers.out_spec[1] else None
    contract, batch = eqn.params["dimension_numbers"]
    free = [
        [k for k in range(eqn.invars[side].aval.ndim) if k not in (*contract[side], *batch[side])] for side in range(2)
    ]
    index = axis - len(batch[0]) - (len(free[0]) if weight_operand == 1 else 0)
    return free[weight_operand][index] if 0 <= index < len(free[weight_operand]) else None


def _changing(eqn: Any) -> range:
    """Operands of a container that its bodies do not see unchanged: carries, and the branch index."""
    if eqn.primitive.name == "scan":
        consts, carry = _compat.scan_split(eqn)
        return range(consts, consts + carry)
    if eqn.primitive.name == "while":
        return range(eqn.params["cond_nconsts"] + eqn.params["body_nconsts"], len(eqn.invars))
    return range(1)


def _inner(eqn: Any, found: Sequence[Source | None]) -> list[tuple[Any, dict[Any, Source]]]:
    """The bodies of a container and which of their variables are weights, in the order of the walk."""
    params = eqn.params
    if eqn.primitive.name == "scan":
        jaxpr, _ = _compat.open_jaxpr(params["jaxpr"])
        consts, carry = _compat.scan_split(eqn)
        sources: dict[Any, Source] = {}
        for index, (var, source) in enumerate(zip(jaxpr.invars, found, strict=True)):
            if source is None or consts <= index < consts + carry:
                continue
            stepped = (*source.steps, id(jaxpr)) if index >= consts else source.steps
            sources[var] = dataclasses.replace(source, steps=stepped)
        return [(jaxpr, sources)]
    if eqn.primitive.name == "while":
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        bodies = [(params["cond_jaxpr"], found[: split[0]]), (params["body_jaxpr"], found[split[0] : split[1]])]
    else:
        bodies = [(branch, found[1:]) for branch in params["branches"]]
    made: list[tuple[Any, dict[Any, Source]]] = []
    for closed, given in bodies:
        jaxpr, _ = _compat.open_jaxpr(closed)
        pairs = zip(jaxpr.invars, given, strict=False)
        made.append((jaxpr, {var: source for var, source in pairs if source is not None}))
    return made


def _moved_back(eqn: Any, axis: int) -> int:
    """The axis of the channels before a layout operation.

    Raises:
        NotAbsorbedError: if they are not a single axis there.
    """
    if eqn.primitive.name == "transpose":
        return eqn.params["permutation"][axis]
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if before == after:
        return axis
    channels, lead = after[axis], math.prod(after[:axis])
    places = [k for k, size in enumerate(before) if size == channels and math.prod(before[:k]) == lead]
    if not places or channels == 1:
        raise NotAbsorbedError("a `reshape` before it splits its channels")
    return places[0]


def _zero(atom: Any) -> bool:
    return isinstance(atom, _compat.LITERAL) and not jnp.any(jnp.asarray(atom.val))


def _first(ways: Sequence[Any]) -> list[Absorber]:
    """The result of the first alternative that applies."""
    reasons: list[NotAbsorbedError] = []
    for way in ways:
        try:
            return way()
        except NotAbsorbedError as error:
            reasons.append(error)
    raise reasons[0]
