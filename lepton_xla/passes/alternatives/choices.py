"""Alternative ways to compute the operations of a program, and a choice of one for each kind of operation."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from lepton_xla.kernels import attention, excitation, norm
from lepton_xla.passes.alternatives import (
    attending,
    convolving,
    exciting,
    expanding,
    fusing,
    norming,
    shifted,
    single_row,
)
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.walker import Context, TracedValue, Values, materialize

# Name of XLA's own implementation among the alternatives.
XLA = "XLA's own"
KERNEL = "a kernel"
# Kernels that take longer alone, compared with XLA's own, are not tried together with others.
TOGETHER_RATIO = 1.5
CONVOLUTION = "conv_general_dilated"
_PRIMITIVES = (CONVOLUTION, "dot_general")


def ways(eqn: Any, *, transposed: bool = False) -> dict[str, Callable[..., jax.Array]]:
    """Alternatives to XLA's own implementation of an operation, by name: functions of its operands.

    Args:
        eqn: the operation.
        transposed: whether its right operand is the transpose of a matrix. The functions then take that matrix.
    """
    found: dict[str, Callable[..., jax.Array]] = {}
    if transposed:
        if single_row.takes_transpose(eqn):
            found["without the transpose"] = functools.partial(single_row.untransposed, eqn)
        return found
    if shifted.fits(eqn):
        convolve = functools.partial(shifted.convolve, eqn.params, dtype=eqn.outvars[0].aval.dtype)
        found["shifted multiply-adds"] = convolve
        if not shifted.has_channels_last(eqn):
            found["shifted multiply-adds, channels last"] = functools.partial(convolve, channels_last=True)
    if convolving.fits(eqn):
        found[KERNEL] = functools.partial(convolving.convolve, eqn.params)
    if single_row.fits(eqn):
        found["row padded to two"] = functools.partial(single_row.padded, eqn)
        found["in float32"] = functools.partial(single_row.widened, eqn)
    return found


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median times of one operation at one size.

    Attributes:
        site: the name of the site.
        sizes: sizes of the symbolic dimensions.
        way_us: microseconds by alternative, including `XLA`.
        note: what a report says of the kernel's numbers.
    """

    site: str
    sizes: dict[str, int]
    way_us: dict[str, float]
    note: str = ""

    def share(self, way: str) -> float:
        """Time of an alternative over that of XLA's own; infinite if it cannot run."""
        return self.way_us.get(way, math.inf) / self.way_us[XLA]


@dataclasses.dataclass(frozen=True)
class Choices:
    """The chosen alternatives for the operations of a program; they also apply to what other passes make of it.

    Attributes:
        way: kind of operation, whose first item names its primitive -> chosen alternative, `XLA` if none is faster.
        timings: kind -> the timings behind the choice.
        joined: whether a kernel computes two convolutions where it can.
    """

    way: Mapping[Any, str] = dataclasses.field(default_factory=dict[Any, str])
    timings: Mapping[Any, Sequence[Timing]] = dataclasses.field(default_factory=dict[Any, Sequence[Timing]])
    joined: bool = False

    @property
    def any(self) -> bool:
        """Whether any operation has an alternative chosen."""
        return any(way != XLA for way in self.way.values())

    @property
    def primitives(self) -> list[str]:
        """Primitives of the operations that have an alternative chosen."""
        return list(dict.fromkeys(kind[0] for kind, way in self.way.items() if way != XLA))

    def only(self, primitives: Iterable[str]) -> Choices:
        """The choices for these primitives; XLA's own for all others."""
        kept = set(primitives)
        return dataclasses.replace(self, way={kind: way if kind[0] in kept else XLA for kind, way in self.way.items()})

    def together(self, *, joined: bool) -> Choices:
        """With every convolution by a kernel that has one which alone is not much slower than XLA's own."""

        def may(kind: Any) -> bool:
            shares = [timing.share(KERNEL) for timing in self.timings.get(kind, ())]
            return kind[0] == CONVOLUTION and bool(shares) and max(shares) < TOGETHER_RATIO

        way = {kind: KERNEL if may(kind) else way for kind, way in self.way.items()}
        return dataclasses.replace(self, way=way, joined=joined)

    def apply(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with the chosen alternatives."""

        def rule(_context: Context, eqn: Any, values: Values) -> Values | None:
            if isinstance(values[1], single_row.Transposed):
                compute = self.of(eqn, transposed=True)
                if compute is not None:
                    return [compute(materialize(values[0]), values[1].matrix)]
            compute = self.of(eqn)
            return None if compute is None else [compute(*(materialize(value) for value in values))]

        def by_kernel(pattern: Any) -> bool:
            return self.way.get(pattern.kind, XLA) == KERNEL

        rules = dict.fromkeys(_PRIMITIVES, rule) | {"transpose": _follow_transpose}
        kernels = {kind[0] for kind, way in self.way.items() if way == KERNEL}
        # First of all, since its products are convolutions.
        tuned = exciting.excite(fn, by_kernel) if excitation.PRIMITIVE.name in kernels else fn
        tuned = rewrite(tuned, rules, inline=True, on_unknown="keep") if self.any else tuned
        if attention.PRIMITIVE.name in kernels:
            tuned = attending.attend(tuned, by_kernel)
        if norm.PRIMITIVE.name in kernels:
            tuned = norming.normalize(tuned, by_kernel)
        if KERNEL not in self.way.values():
            return tuned
        fused = fusing.fuse(tuned)
        return expanding.join(fused) if self.joined else fused

    def of(self, eqn: Any, *, transposed: bool = False) -> Callable[..., jax.Array] | None:
        """The chosen alternative for an operation, as in `ways`; None for XLA's own."""
        found = ways(eqn, transposed=transposed)
        return found.get(self.way.get(kind_of(eqn, transposed=transposed), XLA)) if found else None


def _follow_transpose(_context: Context, eqn: Any, values: Values) -> Values | None:
    (matrix,) = values
    if isinstance(matrix, TracedValue) or eqn.params["permutation"] != (1, 0):
        return None
    return [single_row.Transposed(matrix)]


def kind_of(eqn: Any, *, transposed: bool = False) -> Any:
    """The kind of an operation: everything that determines the fastest alternative, except for the amount of data.

    So one choice holds for all sizes, symbolic ones included, and for the same operation in another program.
    """
    params, operands = eqn.params, [var.aval for var in eqn.invars]
    dtypes = tuple(each.dtype.name for each in (*operands, eqn.outvars[0].aval))
    if eqn.primitive.name == "dot_general":
        side = single_row.single(eqn)
        return (
            eqn.primitive.name,
            params["dimension_numbers"],
            side,
            None if side is None else operands[1 - side].shape,
            dtypes,
            transposed,
        )
    names = ("dimension_numbers", "window_strides", "lhs_dilation", "rhs_dilation", "feature_group_count")
    return (eqn.primitive.name, *(params[name] for name in names), operands[1].shape, dtypes)
