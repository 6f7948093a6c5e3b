"""Attention in a jaxpr: where its operands are, and the kernel's call that takes its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.kernels import attention, integer_product
from lepton_xla.passes.alternatives.patterns import Place
from lepton_xla.passes.core.activations import Graph

_MOVES = ("transpose", "squeeze", "convert_element_type")


def is_float(atom: Any) -> bool:
    """Whether a value has a type that the kernel computes."""
    return atom.aval.dtype.name in attention.FLOATS


def long(shape: Sequence[Any]) -> list[Any]:
    """The sizes other than one."""
    return [size for size in shape if not (isinstance(size, int) and size == 1)]


@dataclasses.dataclass(frozen=True)
class Operand:
    """Where the axes of an operand are; those of size one that nothing needs are in none of them.

    Attributes:
        place: where it is read.
        example, head: axes of examples and of heads, if there are any.
        row: axis of queries or keys.
        depth: axis of their features.
    """

    place: Place
    example: tuple[int, ...]
    head: tuple[int, ...]
    row: int
    depth: int

    def arrange(self, value: jax.Array, *, heads_first: bool = False) -> jax.Array:
        """Give a value of the operand the axes [B, rows, H, depth], or [B, H, rows, depth]."""
        row, head = (self.row,), self.head
        parts = [self.example, *((head, row) if heads_first else (row, head)), (self.depth,)]
        order = tuple(axis for axes in parts for axis in axes)
        others = tuple(axis for axis in range(value.ndim) if axis not in order)
        shape = [size for axes in parts for size in _sizes(value.shape, axes)]
        return jnp.reshape(jnp.transpose(value, (*order, *others)), shape)

    @property
    def heads_first(self) -> bool:
        """Whether all rows of a head are beside each other."""
        return bool(self.head) and self.head[0] < self.row

    @property
    def dtype(self) -> Any:
        """Its type where it is read."""
        return self.place[0].invars[self.place[1]].aval.dtype

    def before_moves(self, graph: Graph) -> Operand:
        """The same operand read before its axes are moved, so that two moves do not have to cancel each other.

        Also before it is converted: the kernel computes in float32.
        """
        eqn, index = self.place
        maker = graph.made_by(eqn.invars[index])
        if maker is None or maker.primitive.name not in _MOVES or not is_float(maker.invars[0]):
            return self
        if maker.primitive.name == "convert_element_type":
            return dataclasses.replace(self, place=(maker, 0)).before_moves(graph)
        if maker.primitive.name == "transpose":
            was = list(maker.params["permutation"])
        else:
            was = [axis for axis in range(maker.invars[0].aval.ndim) if axis not in maker.params["dimensions"]]
        example, head = (tuple(was[axis] for axis in axes) for axes in (self.example, self.head))
        return Operand((maker, 0), example, head, was[self.row], was[self.depth]).before_moves(graph)

    def is_coarse(self, graph: Graph) -> bool:
        """Whether it is a product of activations that were rounded to eight bits, without a float matrix added."""
        atom = self.place[0].invars[self.place[1]]
        while (maker := graph.made_by(atom)) is not None and maker.primitive.name in (*_MOVES, "reshape"):
            atom = maker.invars[0]
        if maker is None or maker.primitive is not integer_product.PRIMITIVE:
            return False
        return not integer_product.has_residual(maker.invars)


def _sizes(shape: Sequence[Any], axes: Sequence[int]) -> tuple[Any, ...]:
    return tuple(shape[axis] for axis in axes) or (1,)


@dataclasses.dataclass
class Pattern:
    """Attention in a jaxpr.

    Attributes:
        query, key, value: its operands.
        last: the equation whose result it is.
        members: all equations before it that nothing else reads.
        order: what each axis of the result is: a letter of `bhqe`, or nothing for one of size one.
        scale: of the scores.
        bias: what is added to the scores: where it is read, its shape among the scores, and what those axes are.
        masked: if `bias` is a mask instead, the score where it is true, and false; None where it stays.
        rounds: whether all operands are coarse: to round them to more than eight bits changes little.
    """

    query: Operand
    key: Operand
    value: Operand
    last: Any
    members: list[Any]
    order: tuple[str, ...]
    scale: float = 1.0
    bias: tuple[Place, tuple[Any, ...], tuple[str, ...]] | None = None
    masked: tuple[float | None, float | None] | None = None
    rounds: bool = False

    @property
    def places(self) -> list[Place]:
        """Where operands and what is added to the scores are read."""
        own = [self.query.place, self.key.place, self.value.place]
        return own if self.bias is None else [*own, self.bias[0]]

    @property
    def heads_first(self) -> bool:
        """Whether keys and values have all rows of a head beside each other; then they are not moved."""
        return self.key.heads_first and self.value.heads_first

    @property
    def dtype(self) -> Any:
        """The type in which the kernel reads query, key and value."""
        types = {each.dtype for each in (self.query, self.key, self.value)}
        return types.pop() if len(types) == 1 else jnp.dtype(jnp.float32)

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the kernel."""
        dtype = self.last.outvars[0].aval.dtype.name
        return {
            "scale": self.scale, "masks": self.masked is not None, "heads_first": self.heads_first,
            "rounds": self.rounds, "dtype": dtype,
        }  # fmt: skip

    def _arranged(self, *values: jax.Array) -> list[jax.Array]:
        """Query, key and value as the kernel takes them."""
        (query, *rows), dtype = (self.query, self.key, self.value), self.dtype
        arranged = [query.arrange(values[0])]
        arranged += [
            each.arrange(value, heads_first=self.heads_first) for each, value in zip(rows, values[1:], strict=True)
        ]
        return [each.astype(dtype) for each in arranged]

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes of query, key, value and bias, as the kernel takes them."""
        given = [each.place[0].invars[each.place[1]].aval for each in (self.query, self.key, self.value)]
        made = jax.eval_shape(self._arranged, *(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in given))
        batch = made[0].shape[0]
        if self.bias is None:
            return (*made, jax.ShapeDtypeStruct((0, 0, 0, 0), jnp.float32))
        sizes = dict(zip(self.bias[2], self.bias[1], strict=True))
        shape = (batch, *(sizes.get(axis, 1) for axis in "hqk"))
        return (*made, jax.ShapeDtypeStruct(shape, jnp.float32))

    @property
    def first(self) -> Any:
        """The first of its equations."""
        return self.members[0]

    @property
    def ways(self) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
        """Functions of the kernel's operands, to be timed: in XLA's own operations, and by the kernel.

        A mask hides half of the keys, as in a cache that is half full: the kernel need not read what is hidden.
        """
        params, masks = self.params, self.masked is not None

        def timed(way: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
            def compute(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
                if masks:
                    keys = bias.shape[3]
                    bias = jnp.where(jnp.arange(keys).reshape(1, 1, 1, keys) * 2 < keys, jnp.zeros_like(bias), bias)
                return way(query, key, value, bias, **params)

            return compute

        return timed(attention.by_xla), timed(attention.PRIMITIVE.bind)

    @property
    def kind(self) -> Any:
        """Everything that determines the fastest way, except for the amount of data."""
        query, _, value, _ = self.shapes
        axes = None
        if self.bias is not None:
            named = zip(self.bias[2], self.bias[1], strict=True)
            axes = tuple(sorted(axis for axis, size in named if axis in ("h", "q", "k") and long([size])))
        single = not long([query.shape[1]])
        types = query.dtype.name, self.last.outvars[0].aval.dtype.name
        return ("attention", query.shape[2:], value.shape[3], axes, self.masked is not None, self.heads_first, single,
                self.rounds, *types)  # fmt: skip

    @property
    def note(self) -> str:
        """What a report says of the kernel's numbers."""
        rounded = "AVX-512 VNNI rounds its operands, products of int8, to some 12 bits"
        return rounded if self.rounds else ""

    @property
    def fits(self) -> bool:
        """Whether the kernel is for sequences of this length."""
        query, key, value, _ = self.shapes
        queries = query.shape[1] if isinstance(query.shape[1], int) else None
        sizes = key.shape[2 if self.heads_first else 1], key.shape[3], value.shape[3]
        return not all(isinstance(size, int) for size in sizes) or attention.fits(queries, *sizes)

    def compute(self, read: Callable[[Place], jax.Array]) -> jax.Array:
        """The result, of query, key and value, and of what is added or the mask, as the jaxpr has them."""
        query, key, value = self._arranged(*(read(each.place) for each in (self.query, self.key, self.value)))
        added = None if self.bias is None else self._arranged_bias(read(self.bias[0]), query.shape[0])
        out = attention.attend(query, key, value, added, **self.params)
        letters = [letter for letter in "bqhe" if letter in self.order]
        kept = jnp.reshape(out, [size for letter, size in zip("bqhe", out.shape, strict=True) if letter in letters])
        kept = jnp.transpose(kept, [letters.index(letter) for letter in self.order if letter])
        return jnp.reshape(kept, self.last.outvars[0].aval.shape)

    def _arranged_bias(self, bias: jax.Array, batch: Any) -> jax.Array:
        assert self.bias is not None
        _, shape, axes = self.bias
        if self.masked is not None:
            scores = [0.0 if score is None else score for score in self.masked]
            bias = jnp.where(bias, jnp.float32(scores[0]), jnp.float32(scores[1]))
        bias = jnp.reshape(bias.astype(jnp.float32), shape)
        found = [letter for letter in "bhqk" if letter in axes]
        rest = [axis for axis, letter in enumerate(axes) if not letter]
        bias = jnp.transpose(bias, (*(axes.index(letter) for letter in found), *rest))
        sizes = {letter: bias.shape[at] for at, letter in enumerate(found)}
        bias = jnp.reshape(bias, [sizes.get(letter, 1) for letter in "bhqk"])
        return jnp.broadcast_to(bias, (batch, *bias.shape[1:]))
