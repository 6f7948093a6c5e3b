"""Finds squeeze-excite, from the mean of each channel to the factor for it, for a kernel to compute in one call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.kernels import excitation
from lepton_xla.kernels.convolution import PRIMITIVES, Epilogue, Geometry, Operands
from lepton_xla.kernels.excitation import Step
from lepton_xla.passes.alternatives import convolving, patterns
from lepton_xla.passes.alternatives.patterns import Place
from lepton_xla.passes.core.activations import Graph, constant_of, find_activation

# Asking for these inlines the calls they are in.
_NAMES = ("reduce_sum", "div", "mul", "add", "max", "logistic", "conv_general_dilated")
_RESHAPING = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")
_OF_CODES = PRIMITIVES["integer_convolution"]
_POINT, _PLAIN = Geometry((1, 1)), Epilogue()
_ACTIVATIONS = {"silu": Epilogue("silu"), "relu": Epilogue("clamp", 0.0)}


@dataclasses.dataclass
class _Product:
    """A convolution of an image of one pixel, and what follows.

    Attributes:
        start: the convolution.
        members: its equations.
        bias: where it is read, `[..., M]`; None: none.
        epilogue: the activation.
    """

    start: Any
    members: list[Any]
    bias: Place | None
    epilogue: Epilogue = _PLAIN

    @property
    def codes(self) -> bool:
        """Whether it is one of codes."""
        return self.start.primitive is _OF_CODES

    @property
    def places(self) -> list[Place]:
        """Where its operands are read: weight, bias, and of codes both scales."""
        others = [(self.start, at) for at in (2, 3)] if self.codes else []
        return [(self.start, 1), *([] if self.bias is None else [self.bias]), *others]

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of its weight."""
        return self.start.invars[0].aval.shape[3], self.start.outvars[0].aval.shape[3]

    def step(self, read: Callable[[Place], jax.Array]) -> Step:
        """As the kernel takes it."""
        weight = read((self.start, 1))
        bias = None if self.bias is None else jnp.reshape(read(self.bias), (-1,))
        if self.codes:
            return Step(weight, bias, read((self.start, 2)), read((self.start, 3)))
        outputs, inputs, *positions = self.start.params["dimension_numbers"].rhs_spec
        return Step(jnp.reshape(jnp.transpose(weight, (*positions, inputs, outputs)), self.sizes), bias)

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Those of `Step.operands`."""
        biases = (0,) if self.bias is None else self.sizes[1:]
        if not self.codes:
            return [jax.ShapeDtypeStruct(size, jnp.float32) for size in (self.sizes, (1, 0), (0,), biases)]
        weight, scale, static = (self.start.invars[at].aval for at in (1, 2, 3))
        given = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (weight, scale, static)]
        return [*given, jax.ShapeDtypeStruct(biases, jnp.float32)]


@dataclasses.dataclass
class Pattern:
    """Squeeze-excite in a jaxpr.

    Attributes:
        first: the sum of each channel.
        last: the logistic function.
        members: all equations before it that nothing else reads.
        narrow, wide: the two products.
    """

    first: Any
    last: Any
    members: list[Any]
    narrow: _Product
    wide: _Product

    @property
    def codes(self) -> bool:
        """Whether both products are of codes."""
        return self.narrow.codes

    @property
    def places(self) -> list[Place]:
        """Where its operands are read."""
        return [(self.first, 0), *self.narrow.places, *self.wide.places]

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes of the kernel's operands."""
        image = jax.ShapeDtypeStruct(self.first.invars[0].aval.shape, jnp.float32)
        return image, *self.narrow.shapes(), *self.wide.shapes()

    @property
    def kind(self) -> Any:
        """Everything that determines the fastest way, except for the amount of data."""
        return excitation.PRIMITIVE.name, *self.narrow.sizes, self.wide.sizes[1], self.narrow.epilogue, self.codes

    @property
    def ways(self) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
        """Functions of the kernel's operands: in XLA's own operations, and by the kernel."""
        params = {"epilogue": self.narrow.epilogue}
        return (
            lambda *given: excitation.by_xla(*given, **params),
            lambda *given: excitation.PRIMITIVE.bind(*given, **params),
        )

    def compute(self, read: Callable[[Place], jax.Array]) -> jax.Array:
        """The result, of the operands as the jaxpr has them."""
        steps = self.narrow.step(read), self.wide.step(read)
        return excitation.excite(read((self.first, 0)), *steps, self.narrow.epilogue)


def excite(fn: Callable[..., Any], wanted: Callable[[Pattern], bool]) -> Callable[..., Any]:
    """Compute squeeze-excite by the kernel.

    Args:
        fn: any function, for inference.
        wanted: whether to replace a pattern.
    """
    return patterns.replace(flat(fn), find, wanted)


def flat(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the calls around parts of squeeze-excite."""
    return patterns.without_calls(fn, _NAMES)


def find(closed: Any) -> Iterator[Pattern]:
    """Find squeeze-excite in a jaxpr and in all jaxprs inside it."""
    return patterns.find(closed, "reduce_sum", _pattern)


def _pattern(graph: Graph, total: Any) -> Pattern | None:
    """The squeeze-excite that begins with a sum; None if there is none."""
    members = _means(graph, total)
    narrow = _product(graph, members[-1].outvars[0]) if members else None
    wide = None if narrow is None else _product(graph, narrow.members[-1].outvars[0])
    if narrow is None or wide is None or narrow.codes != wide.codes or wide.epilogue.activation != "none":
        return None
    last = graph.only_reader(wide.members[-1].outvars[0])
    if last is None or last.primitive.name != "logistic":
        return None
    return Pattern(total, last, [*members, *narrow.members, *wide.members], narrow, wide)


def _means(graph: Graph, total: Any) -> list[Any]:
    """The equations that make means [N, 1, 1, C] of a sum, itself included; empty if these are none."""
    image = total.invars[0].aval
    if image.ndim != 4 or image.dtype != jnp.float32 or total.params["axes"] != (1, 2):
        return []
    if not all(isinstance(size, int) and size > 0 for size in image.shape[1:]):
        return []
    rows, whole = (image.shape[0], image.shape[3]), (image.shape[0], 1, 1, image.shape[3])
    members, factor = [total], 1.0
    while True:
        out = members[-1].outvars[0]
        eqn = graph.only_reader(out)
        if eqn is None or eqn.outvars[0].aval.shape not in (rows, whole):
            break
        name = eqn.primitive.name
        places = {"broadcast_in_dim": eqn.params.get("broadcast_dimensions")}.get(name)
        if name in _RESHAPING and places in (None, (0, 3), tuple(range(out.aval.ndim))):
            members.append(eqn)
            continue
        number = constant_of(graph, eqn.invars[1]) if name in ("div", "mul") and eqn.invars[0] is out else None
        if not number:
            break
        factor *= number if name == "mul" else 1 / number
        members.append(eqn)
    is_mean = math.isclose(factor * math.prod(image.shape[1:3]), 1, rel_tol=1e-6)
    return members if is_mean and members[-1].outvars[0].aval.shape == whole else []


def _product(graph: Graph, image: Any) -> _Product | None:
    """The product that alone reads an image of one pixel; None if there is none."""
    eqn = graph.only_reader(image)
    if eqn is None or eqn.invars[0] is not image:
        return None
    if eqn.primitive is _OF_CODES:
        given = Operands(*(atom.aval for atom in eqn.invars))
        plain = given.static.shape == (1,) and given.gate.ndim == given.residual.ndim == 1
        filters = given.codes.shape[0] != given.x.shape[3]  # one a channel
        if not plain or filters or eqn.params["geometry"] != _POINT:
            return None
        return _Product(eqn, [eqn], (eqn, 6) if given.bias.shape[0] else None, eqn.params["epilogue"])
    if not convolving.fits(eqn) or eqn.params["feature_group_count"] != 1:
        return None
    if convolving.geometry_of(eqn.params, *(atom.aval for atom in eqn.invars)) != _POINT:
        return None
    found = _Product(eqn, [eqn], None)
    adding = graph.only_reader(eqn.outvars[0])
    if adding is not None and adding.primitive.name == "add":
        (place,) = [at for at, atom in enumerate(adding.invars) if atom is not eqn.outvars[0]]
        other = adding.invars[place]
        if not isinstance(other, _compat.LITERAL) and other.aval.shape == (1, 1, 1, found.sizes[1]):
            found.bias = adding, place
            found.members.append(adding)
    name, equations = find_activation(graph, found.members[-1].outvars[0]) or ("", [])
    if name in _ACTIVATIONS:
        found.epilogue = _ACTIVATIONS[name]
        found.members += equations
    return found
