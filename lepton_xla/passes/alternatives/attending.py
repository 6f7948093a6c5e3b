"""Finds attention, from the product of queries and keys to that of the softmax and values, for a kernel to compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lepton_xla.passes.alternatives import patterns
from lepton_xla.passes.alternatives.attention_pattern import Operand, Pattern, is_float, long
from lepton_xla.passes.alternatives.patterns import Place
from lepton_xla.passes.core.activations import Graph, constant_of

# Asking for these inlines the calls they are in.
_NAMES = ("dot_general", "mul", "div", "add", "select_n", "transpose", "reduce_max", "exp", "sub", "reduce_sum", "and",
          "convert_element_type")  # fmt: skip
_SAME_VALUES = ("transpose", "squeeze", "reshape", "broadcast_in_dim")


def attend(fn: Callable[..., Any], wanted: Callable[[Pattern], bool]) -> Callable[..., Any]:
    """Compute attention by the kernel.

    Args:
        fn: any function, for inference.
        wanted: whether to replace a pattern.
    """
    return patterns.replace(flat(fn), find, wanted)


def flat(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the calls around parts of attention."""
    return patterns.without_calls(fn, _NAMES)


def find(closed: Any) -> Iterator[Pattern]:
    """Find the attention in a jaxpr and in all jaxprs inside it."""
    return patterns.find(closed, "dot_general", lambda graph, eqn: _Search(graph, eqn).run())


def _sides(eqn: Any) -> list[tuple[tuple[int, ...], int, list[int]]] | None:
    """Batch axes, contracted axis and free axes of both operands of a float product; None if it has others."""
    contract, batch = eqn.params["dimension_numbers"]
    floats = all(is_float(var) for var in (*eqn.invars, *eqn.outvars))
    if not floats or len(contract[0]) != 1 or eqn.params.get("out_sharding") is not None:
        return None
    return [
        (
            tuple(batch[side]),
            contract[side][0],
            [axis for axis in range(eqn.invars[side].aval.ndim) if axis not in (*batch[side], *contract[side])],
        )
        for side in (0, 1)
    ]


def _free_axis(eqn: Any, side: int, free: Sequence[int]) -> int | None:
    """The free axis of an operand that is not of size one, or the first; None if there are several or none."""
    sizes = eqn.invars[side].aval.shape
    long = [axis for axis in free if not (isinstance(sizes[axis], int) and sizes[axis] == 1)]
    return None if len(long) > 1 or not free else (long or list(free))[0]


def _batch(letters: Sequence[str], axes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of examples and those of heads among batch axes."""
    of = {name: tuple(axis for letter, axis in zip(letters, axes, strict=True) if letter == name) for name in "bh"}
    return of["b"], of["h"]


def _moved(eqn: Any, axes: Sequence[str]) -> list[str] | None:
    """What the axes are after an equation that only moves them, or adds and drops some of size one; else None."""
    name, params = eqn.primitive.name, eqn.params
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name == "transpose":
        return [str(axes[axis]) for axis in params["permutation"]]
    if name == "convert_element_type":
        return list(axes) if is_float(eqn.outvars[0]) else None
    if name == "broadcast_in_dim":
        kept = {new: axes[old] for old, new in enumerate(params["broadcast_dimensions"])}
        same = all(before[old] == after[new] for old, new in enumerate(params["broadcast_dimensions"]))
        return [kept.get(axis, "") for axis in range(len(after))] if same and long(before) == long(after) else None
    if name == "squeeze" and not any(axes[axis] for axis in params["dimensions"]):
        return [axis for at, axis in enumerate(axes) if at not in params["dimensions"]]
    return None


class _Search:
    """Follows the scores of a product to the product with the values."""

    def __init__(self, graph: Graph, first: Any) -> None:
        self.graph, self.first = graph, first
        self.members: list[Any] = [first]
        self.scale = 1.0
        self.bias: tuple[Place, tuple[Any, ...], list[str]] | None = None
        self.masked: tuple[float | None, float | None] | None = None
        self.axes: list[str] = []  # of the scores: b, h, and l and r for the free axes of both operands
        self.var = first.outvars[0]

    def run(self) -> Pattern | None:
        """The pattern that begins with the product; None if there is none."""
        sides = _sides(self.first)
        if sides is None:
            return None
        free = [_free_axis(self.first, side, sides[side][2]) for side in (0, 1)]
        if free[0] is None or free[1] is None:
            return None
        letters = self._batch_letters(sides[0][0])
        if letters is None:
            return None
        self.axes = [*letters]
        for side, letter in enumerate("lr"):
            self.axes += [letter if axis == free[side] else "" for axis in sides[side][2]]
        keys = self._to_softmax()
        if keys is None:
            return None
        last = self._to_product()
        if last is None:
            return None
        places = {"l": 0, "r": 1}
        at = places[keys]
        row = {"query": free[1 - at], "key": free[at]}
        query, key = (
            Operand((self.first, side), *_batch(letters, sides[side][0]), int(row[name] or 0), sides[side][1])
            for name, side in (("query", 1 - at), ("key", at))
        )
        named = {"l": "q", "r": "k"} if keys == "r" else {"l": "k", "r": "q"}
        named = {**named, "b": "b", "h": "h", "": ""}
        value, order = self._value(last, keys, named)
        if value is None:
            return None
        bias = None
        if self.bias is not None:
            bias = self.bias[0], self.bias[1], tuple(named[axis] for axis in self.bias[2])
        query, key, value = (each.before_moves(self.graph) for each in (query, key, value))
        rounds = all(each.is_coarse(self.graph) for each in (query, key, value))
        found = Pattern(query, key, value, last, self.members, order, self.scale, bias, self.masked, rounds)
        return found if found.fits else None

    def _batch_letters(self, axes: Sequence[int]) -> list[str] | None:
        """What the batch axes of the product are; of three or more, those of size one are nothing.

        A single one is of heads if it was no leading axis in memory.
        """
        sizes = self.first.invars[0].aval.shape
        kept = list(axes) if len(axes) <= 2 else [axis for axis in axes if long([sizes[axis]])]
        if len(kept) > 2:
            return None
        names = dict(zip(kept, "bh" if len(kept) == 2 else self._single_letter(), strict=False))
        return [names.get(axis, "") for axis in axes]

    def _single_letter(self) -> str:
        atom = self.first.invars[0]
        while (maker := self.graph.made_by(atom)) is not None and maker.primitive.name in _SAME_VALUES:
            if maker.primitive.name == "transpose":
                return "h"
            atom = maker.invars[0]
        return "b"

    def _only(self) -> Any:
        return self.graph.only_reader(self.var)

    def _take(self, eqn: Any) -> None:
        self.members.append(eqn)
        self.var = eqn.outvars[0]

    def _to_softmax(self) -> str | None:
        """Go through scale, bias, mask and softmax; the axis of the softmax."""
        while (eqn := self._only()) is not None:
            name = eqn.primitive.name
            others = [index for index, atom in enumerate(eqn.invars) if atom is not self.var]
            if not is_float(eqn.outvars[0]):
                return None
            moved = _moved(eqn, self.axes)
            if moved is not None:
                self.axes = moved
            elif eqn.outvars[0].aval.shape != self.var.aval.shape:
                return None  # they are spread
            elif name in ("mul", "div") and not (name == "div" and others == [0]):
                factor = constant_of(self.graph, eqn.invars[others[0]])
                if factor is None or self.bias is not None or not math.isfinite(factor) or factor == 0:
                    return None
                self.scale = self.scale * factor if name == "mul" else self.scale / factor
            elif not (name == "add" and self._add(eqn, others[0])) and not (name == "select_n" and self._mask(eqn)):
                return None
            self._take(eqn)
        return self._softmax()

    def _add(self, eqn: Any, side: int) -> bool:
        if self.bias is not None or constant_of(self.graph, eqn.invars[side]) is not None:
            return False
        return self._read(eqn, side)

    def _mask(self, eqn: Any) -> bool:
        if self.bias is not None or eqn.invars[0] is self.var or len(eqn.invars) != 3:
            return False
        kept = 1 if eqn.invars[1] is self.var else 2
        score = constant_of(self.graph, eqn.invars[3 - kept])
        if not score or eqn.invars[0].aval.dtype != jnp.bool_:  # zero stands for a score that stays
            return False
        self.masked = (score, None) if kept == 1 else (None, score)  # the last case is of what is true
        return self._read(eqn, 0)

    def _read(self, eqn: Any, side: int) -> bool:
        """Note what is added, or the mask: where it is read before it gets the shape of the scores."""
        place, atom = (eqn, side), eqn.invars[side]
        shape: tuple[Any, ...] = atom.aval.shape
        if len(shape) != len(self.axes):
            return False
        while (maker := self.graph.made_by(atom)) is not None:
            name = maker.primitive.name
            if name == "and":
                trues = [constant_of(self.graph, each) == 1.0 for each in maker.invars]
                if trues == [trues[0], trues[0]]:
                    break
                index = trues.index(False)
                place, shape = (maker, index), maker.invars[index].aval.shape
            elif name == "broadcast_in_dim":
                inner, axes = maker.invars[0].aval, maker.params["broadcast_dimensions"]
                if not inner.shape or list(axes) != sorted(axes) or len(atom.aval.shape) != len(shape):
                    break
                sizes = dict(zip(axes, inner.shape, strict=True))
                shape = tuple(sizes.get(axis, 1) for axis in range(len(shape)))
                place = (maker, 0)
                if inner.shape != shape:
                    break  # with fewer axes it is read here
            else:
                break
            atom = place[0].invars[place[1]]
        self.bias = place, shape, list(self.axes)
        return True

    def _softmax(self) -> str | None:
        """Go through a softmax of the scores."""
        readers = {eqn.primitive.name: eqn for eqn in self.graph.readers.get(self.var, [])}
        if set(readers) != {"reduce_max", "sub"} or self._read_often(2):
            return None
        most, apart = readers["reduce_max"], readers["sub"]
        axis = self._reduced(most, apart, self.var)
        if axis is None:
            return None
        self._take(apart)
        raised = self._only()
        if raised is None or raised.primitive.name != "exp":
            return None
        self._take(raised)
        readers = {eqn.primitive.name: eqn for eqn in self.graph.readers.get(self.var, [])}
        wide = readers.pop("convert_element_type", None)  # 16-bit floats are added up in 32 bits
        if (
            wide is not None
            and is_float(wide.outvars[0])
            and (summed := self.graph.only_reader(wide.outvars[0])) is not None
        ):
            readers[summed.primitive.name] = summed
            self.members.append(wide)
        if set(readers) != {"reduce_sum", "div"} or self._read_often(2):
            return None
        if self._reduced(readers["reduce_sum"], readers["div"], self.var) != axis:
            return None
        self._take(readers["div"])
        return self.axes[axis] if self.axes[axis] in ("l", "r") else None

    def _read_often(self, times: int) -> bool:
        return len(self.graph.readers.get(self.var, [])) != times or self.var in self.graph.outputs

    def _reduced(self, reduction: Any, reader: Any, whole: Any) -> int | None:
        """The axis of a reduction whose result, broadcast again, is the second operand of `reader`."""
        axes = reduction.params["axes"]
        if len(axes) != 1 or reader.invars[0] is not whole:
            return None
        passed, var = [reduction], reduction.outvars[0]
        while (eqn := self.graph.only_reader(var)) is not None and eqn is not reader:
            name = eqn.primitive.name
            lowest = name == "max" and any(constant_of(self.graph, each) == -math.inf for each in eqn.invars)
            if name == "broadcast_in_dim":
                kept = [axis for axis in range(whole.aval.ndim) if axis != axes[0]]
                if eqn.invars[0].aval.ndim != whole.aval.ndim and list(eqn.params["broadcast_dimensions"]) != kept:
                    return None
                if eqn.outvars[0].aval.ndim != whole.aval.ndim:
                    return None
            elif not is_float(eqn.outvars[0]) or not (
                lowest or name in ("stop_gradient", "copy", "copy_p", "convert_element_type")
            ):
                return None
            passed.append(eqn)
            var = eqn.outvars[0]
        if eqn is None or reader.invars[1] is not var or var.aval.ndim != whole.aval.ndim:
            return None
        self.members += passed
        return int(axes[0])

    def _to_product(self) -> Any:
        """Go to the product with the values."""
        while (eqn := self._only()) is not None and (moved := _moved(eqn, self.axes)) is not None:
            self.axes = moved
            self._take(eqn)
        return eqn if eqn is not None and eqn.primitive.name == "dot_general" else None

    def _value(self, last: Any, keys: str, named: Mapping[str, str]) -> tuple[Operand | None, tuple[str, ...]]:
        """The operand of the values, and the axes of the result."""
        sides = _sides(last)
        if sides is None:
            return None, ()
        own = 0 if last.invars[0] is self.var else 1
        batch, contracted, free = sides[own]
        letters = [self.axes[axis] for axis in batch]
        named_axes = sorted(axis for axis in self.axes if axis in ("b", "h"))
        if self.axes[contracted] != keys or sorted(filter(None, letters)) != named_axes:
            return None, ()
        other_batch, other_contracted, other_free = sides[1 - own]
        column = _free_axis(last, 1 - own, other_free)
        if column is None or any(self.axes[axis] in ("b", "h") for axis in free):
            return None, ()
        value = Operand((last, 1 - own), *_batch(letters, other_batch), other_contracted, column)
        parts = {
            own: [named[self.axes[axis]] for axis in free],
            1 - own: ["e" if axis == column else "" for axis in other_free],
        }
        return value, (*letters, *parts[0], *parts[1])
