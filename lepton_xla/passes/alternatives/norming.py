"""Finds layer norm and RMS norm by what they compute, however they are written, for a kernel to compute."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.kernels import norm
from lepton_xla.passes.alternatives import patterns
from lepton_xla.passes.alternatives.patterns import Place
from lepton_xla.passes.core.activations import ELEMENTWISE, Graph, constant_of

# Asking for these inlines the calls they are in.
_NAMES = ("reduce_sum", "rsqrt", "sqrt", "mul", "sub", "div", "add", "square", "integer_pow", "max", "select_n")
_RESHAPING = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")
# More equations than any spelling of a norm has.
_MOST_EQUATIONS = 24
# Narrower rows are not worth a call.
_LEAST_WIDTH = 16
# No norm has a larger one; NumPy's sums in float64 differ by less than this.
_LARGEST_EPSILON, _TOLERANCE = 0.1, 1e-6


@dataclasses.dataclass
class Pattern:
    """A norm in a jaxpr.

    Attributes:
        x: where its operand is read, [..., K].
        last: the equation whose result it is.
        members: all equations before it that nothing else reads.
        epsilon, centered: as in `kernels.norm`.
        gain, shift: where they are read, [K]; None: none.
    """

    x: Place
    last: Any
    members: list[Any]
    epsilon: float
    centered: bool
    gain: Place | None
    shift: Place | None

    @property
    def first(self) -> Any:
        """The first of its equations."""
        return self.x[0]

    @property
    def places(self) -> list[Place]:
        """Where its operands are read."""
        return [place for place in (self.x, self.gain, self.shift) if place is not None]

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.last.outvars[0].aval.shape[-1]

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes of the kernel's operands."""
        rows = math.prod(self.last.outvars[0].aval.shape[:-1])
        sizes = (rows, self.width), *((0 if each is None else self.width,) for each in (self.gain, self.shift))
        return tuple(jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes)

    @property
    def kind(self) -> Any:
        """Everything that determines the fastest way, except for the amount of data."""
        return norm.PRIMITIVE.name, self.width, self.centered, self.gain is None, self.shift is None

    @property
    def ways(self) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
        """Functions of the kernel's operands: in XLA's own operations, and by the kernel."""
        params = {"epsilon": self.epsilon, "centered": self.centered}
        return lambda *given: norm.by_xla(*given, **params), lambda *given: norm.PRIMITIVE.bind(*given, **params)

    def compute(self, read: Callable[[Place], jax.Array]) -> jax.Array:
        """The result, of the operands as the jaxpr has them."""
        x, gain, shift = (None if place is None else read(place) for place in (self.x, self.gain, self.shift))
        assert x is not None
        rows = jnp.reshape(x, (math.prod(x.shape[:-1]), self.width))
        vectors = [None if each is None else jnp.reshape(each, (self.width,)) for each in (gain, shift)]
        out = norm.normalize(rows, *vectors, epsilon=self.epsilon, centered=self.centered)
        return jnp.reshape(out, self.last.outvars[0].aval.shape)


def normalize(fn: Callable[..., Any], wanted: Callable[[Pattern], bool]) -> Callable[..., Any]:
    """Compute norms by the kernel.

    Args:
        fn: any function, for inference.
        wanted: whether to replace a pattern.
    """

    return patterns.replace(flat(fn), find, wanted)


def flat(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the calls around parts of norms."""
    return patterns.without_calls(fn, _NAMES)


def find(closed: Any) -> Iterator[Pattern]:
    """Find the norms in a jaxpr and in all jaxprs inside it."""
    return patterns.find(closed, "reduce_sum", _pattern)


def _pattern(graph: Graph, total: Any) -> Pattern | None:
    """The norm that a sum is the first of; None if it is of none."""
    searches = (_Search(graph, start).run() for start in _starts(graph, total))
    return next((pattern for pattern in searches if pattern is not None), None)


def _starts(graph: Graph, total: Any) -> Iterator[Any]:
    """What a sum along the last axis may be the first of a norm of: what is summed, or what is squared before."""
    atom = total.invars[0]
    shape = atom.aval.shape
    if atom.aval.dtype != jnp.float32 or len(shape) < 2 or total.params["axes"] != (len(shape) - 1,):
        return
    if not isinstance(shape[-1], int) or shape[-1] < _LEAST_WIDTH:
        return
    yield atom
    maker = graph.made_by(atom)
    if maker is not None and maker.primitive.name in ("mul", "square", "integer_pow"):
        squared = maker.invars[0]
        if squared.aval.shape == shape:  # not a number
            yield squared


class _Search:
    """Evaluates what depends on rows in float64, for a few rows, and compares it with norms.

    Values are [rows, K], [rows, 1] or, of vectors, [1, K].
    """

    def __init__(self, graph: Graph, start: Any) -> None:
        self.graph, self.start = graph, start
        *self.lead, self.width = start.aval.shape
        random = np.random.default_rng(0)
        # Of very small numbers, epsilon is the larger part of what the root is taken of.
        self.rows = random.standard_normal((3, self.width)) * [[1.0], [1e-3], [1e-6]] + [[2.0], [1e-3], [-1e-6]]
        self.values: dict[Any, np.ndarray] = {start: self.rows}
        self.vectors: dict[Place, np.ndarray] = {}
        self.numbers: list[float] = []
        self.random = random

    def run(self) -> Pattern | None:
        """The longest norm that begins there; None if there is none."""
        found: Pattern | None = None
        with np.errstate(all="ignore"):
            for eqn in self.graph.following(self.start):
                if len(eqn.outvars) > 1 or all(atom not in self.values for atom in _variables(eqn)):
                    continue
                value = self._evaluate(eqn)
                if value is None:
                    continue
                out = eqn.outvars[0]
                self.values[out] = value
                if len(self.values) > _MOST_EQUATIONS:
                    break
                if value.shape == self.rows.shape and out.aval.shape == self.start.aval.shape:
                    found = self._named(eqn, value) or found
        return found

    def _evaluate(self, eqn: Any) -> np.ndarray | None:
        """The value of an equation; None if it is none that a norm has."""
        name, out = eqn.primitive.name, eqn.outvars[0].aval
        if out.dtype != jnp.float32:
            return None
        operands = [self._operand(eqn, index) for index in range(len(eqn.invars))]
        if any(operand is None for operand in operands):
            return None
        (value, *_) = operands
        assert value is not None
        if name == "reduce_sum":
            last = eqn.invars[0].aval.ndim - 1
            whole = eqn.params["axes"] == (last,) and value.shape == self.rows.shape
            return value.sum(axis=1, keepdims=True) if whole else None
        if name in _RESHAPING:
            return self._reshaped(value, out.shape) if self._keeps_rows(eqn, value) else None
        if name == "integer_pow":
            return value ** float(eqn.params["y"])
        function = ELEMENTWISE.get(name)
        if function is None or not all(_broadcasts(atom.aval.shape, out.shape) for atom in eqn.invars):
            return None
        return np.asarray(function(*operands), np.float64)

    def _operand(self, eqn: Any, index: int) -> np.ndarray | None:
        atom = eqn.invars[index]
        if not isinstance(atom, _compat.LITERAL) and atom in self.values:
            return self.values[atom]
        number = constant_of(self.graph, atom)
        if number is not None:
            self.numbers.append(number)
            return np.asarray(number)
        place = self._vector((eqn, index), eqn.outvars[0].aval.shape)
        if place is None:
            return None
        if place not in self.vectors:
            self.vectors[place] = self.random.standard_normal((1, self.width))
        return self.vectors[place]

    def _vector(self, place: Place, shape: Sequence[Any]) -> Place | None:
        """Where a vector [K] is read that is the same for all rows, if this operand is one."""
        atom = place[0].invars[place[1]]
        if not _broadcasts(atom.aval.shape, shape) or len(shape) != len(self.lead) + 1:
            return None
        while atom.aval.ndim != 1:
            maker = self.graph.made_by(atom)
            if maker is None or maker.primitive.name not in _RESHAPING:
                return None
            before, after = maker.invars[0].aval, maker.outvars[0].aval
            if not before.shape or before.shape[-1] != self.width or after.shape[-1] != self.width:
                return None
            if maker.primitive.name == "broadcast_in_dim":
                if maker.params["broadcast_dimensions"][-1] != after.ndim - 1:
                    return None
            elif before.size != after.size:
                return None
            place, atom = (maker, 0), maker.invars[0]
        fits = atom.aval.shape == (self.width,) and atom.aval.dtype == jnp.float32
        return place if fits and not isinstance(atom, _compat.LITERAL) else None

    def _keeps_rows(self, eqn: Any, value: np.ndarray) -> bool:
        """Whether rows stay rows, in their order, with one value or with K."""
        before, after = list(eqn.invars[0].aval.shape), list(eqn.outvars[0].aval.shape)
        if value.ndim == 0:
            return False
        if value.shape[1] == self.width and before == [*self.lead, self.width]:
            return after == before
        if before not in (self.lead, [*self.lead, 1]) or after not in (
            self.lead, [*self.lead, 1], [*self.lead, self.width],
        ):  # fmt: skip
            return False
        if eqn.primitive.name != "broadcast_in_dim":
            return after[len(self.lead) :] in ([], [1])
        return tuple(eqn.params["broadcast_dimensions"]) == tuple(range(len(before)))

    def _reshaped(self, value: np.ndarray, shape: Sequence[Any]) -> np.ndarray:
        whole = len(shape) == len(self.lead) + 1 and shape[-1] == self.width
        return np.broadcast_to(value, self.rows.shape) if whole else value

    def _named(self, last: Any, value: np.ndarray) -> Pattern | None:
        """The norm with these values, if nothing else reads what is between."""
        members = self._members(last)
        if members is None:
            return None
        epsilons = [number for number in dict.fromkeys([0.0, *self.numbers]) if 0 <= number <= _LARGEST_EPSILON]
        vectors = [None, *self.vectors]
        for centered, epsilon in itertools.product((True, False), epsilons):
            different = self.rows - self.rows.mean(axis=1, keepdims=True) if centered else self.rows
            plain = different / np.sqrt((different**2).mean(axis=1, keepdims=True) + epsilon)
            for gain, shift in itertools.product(vectors, vectors):
                expected = plain * (1.0 if gain is None else self.vectors[gain])
                expected = expected + (0.0 if shift is None else self.vectors[shift])
                if np.allclose(value, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
                    start = next(eqn for eqn in (*members, last) if self.start in _variables(eqn))
                    x = start, next(at for at, atom in enumerate(start.invars) if atom is self.start)
                    return Pattern(x, last, members, epsilon, centered, gain, shift)
        return None

    def _members(self, last: Any) -> list[Any] | None:
        """The equations between, in order; None if something else reads one of their results."""
        found: list[Any] = []

        def visit(eqn: Any) -> None:
            for atom in _variables(eqn):
                maker = self.graph.made_by(atom)
                if atom is not self.start and atom in self.values and maker not in found:
                    visit(maker)
            found.append(eqn)

        visit(last)
        within = {id(eqn) for eqn in found}
        for eqn in found[:-1]:
            out = eqn.outvars[0]
            if out in self.graph.outputs or any(id(each) not in within for each in self.graph.readers.get(out, [])):
                return None
        return found[:-1]


def _broadcasts(shape: Sequence[Any], to: Sequence[Any]) -> bool:
    """Whether an operand of a shape is a number, or has the axes of the result, some of them of size one."""
    same = len(shape) == len(to) and all(size in (1, wanted) for size, wanted in zip(shape, to, strict=True))
    return not shape or same


def _variables(eqn: Any) -> list[Any]:
    return [atom for atom in eqn.invars if not isinstance(atom, _compat.LITERAL)]
