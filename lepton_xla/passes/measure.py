"""Times products and whole programs, in float and in integers, as compiled for the machine at hand."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.passes import products
from lepton_xla.passes.sites import Site
from lepton_xla.quant import FORMATS, absmax_scale

if TYPE_CHECKING:
    from lepton_xla.recipe import QuantizeRule

ROUNDS = 21
MIN_ROUNDS = 3
# Rounds are fewer where they would take longer than this in all.
BUDGET_S = 2.0
# A round runs the product often enough to last this long, so that the clock's own cost does not count.
ROUND_S = 2e-4


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median times of one site's product, in microseconds.

    Attributes:
        sizes: sizes of the symbolic dimensions.
        float_us: as the program had it.
        integer_us: with int8 operands.
        padded_us: with a single row padded to two, None where there are more.
    """

    sizes: dict[str, int]
    float_us: float
    integer_us: float
    padded_us: float | None

    def best_us(self, pad: bool) -> float:
        """The integer product's time, single rows padded or not."""
        return self.padded_us if pad and self.padded_us is not None else self.integer_us

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class WholeTiming:
    """Median times of one call of the whole program, in microseconds.

    Attributes:
        sizes: sizes of the symbolic dimensions.
        float_us: as the program had it.
        set_us: with each of the tried sets of sites in integers.
    """

    sizes: dict[str, int]
    float_us: float
    set_us: tuple[float, ...]


def time_programs(
    functions: Sequence[tuple[Callable[..., Any], Any]], inputs: Sequence[jax.ShapeDtypeStruct]
) -> list[float]:
    """Median times in microseconds of functions of weights and the same inputs, timed in turn.

    Args:
        functions: pairs of `fn(weights, *inputs)` and its weights.
        inputs: shapes and dtypes; floats are drawn at random, anything else is zero.
    """
    arrays = [
        jax.random.normal(jax.random.key(number), leaf.shape, jnp.float32).astype(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else jnp.zeros(leaf.shape, leaf.dtype)
        for number, leaf in enumerate(inputs)
    ]
    return _medians_us([_compiled(fn, weights, *arrays) for fn, weights in functions])


def compare(site: Site, decision: QuantizeRule, sizes: Mapping[str, int]) -> Timing:
    """Times one site, found at the given sizes, on random operands. Sites that look the same are timed once."""
    float_us, integer_us, padded_us = _compare(_Key(site, decision))
    return Timing(dict(sizes), float_us, integer_us, padded_us)


class _Key:
    """A site as far as its product's time depends on it."""

    def __init__(self, site: Site, decision: QuantizeRule) -> None:
        self.site = site
        self.decision = decision
        self.facts = (
            site.kind,
            site.weight_operand,
            tuple((operand.shape, operand.dtype.name) for operand in site.operands),
            str(sorted(site.params.items(), key=lambda item: item[0])),
            decision.weights,
            decision.activations,
            decision.granularity,
            decision.dynamic,
        )

    def __hash__(self) -> int:
        return hash(self.facts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.facts == other.facts


@functools.lru_cache(maxsize=1024)
def _compare(key: _Key) -> tuple[float, float, float | None]:
    site, decision = key.site, key.decision
    operands = [
        jax.random.normal(jax.random.key(number), shape.shape, jnp.float32).astype(shape.dtype)
        for number, shape in enumerate(site.operands)
    ]
    name = decision.activations

    def as_float(*operands: jax.Array) -> jax.Array:
        return _compat.bind(site.eqn, operands)[0]

    def of_weight(act: jax.Array, stored: Any, scale: Any, pad: bool = False) -> jax.Array:
        return products.code_product(site, act, stored, name, scale, pad_single=pad)

    def of_pair(left: jax.Array, right: jax.Array, pad: bool = False) -> jax.Array:
        return products.pair_product(site, left, right, name, pad_single=pad)

    if site.weight_operand is None:
        as_integer, args = of_pair, operands
    else:
        weight, act = operands[site.weight_operand], operands[1 - site.weight_operand]
        stored = products.store(site, weight, decision.weights, decision.granularity)
        scale = None if decision.dynamic else absmax_scale(jnp.max(jnp.abs(act)), FORMATS[name])
        as_integer, args = of_weight, (act, stored, scale)
    calls = [_compiled(as_float, *operands), _compiled(as_integer, *args)]
    if products.row_count(site) == 1:
        calls.append(_compiled(functools.partial(as_integer, pad=True), *args))
    times = _medians_us(calls)
    return times[0], times[1], times[2] if len(times) == 3 else None


def _compiled(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    compiled = jax.jit(fn).lower(*args).compile()
    return lambda: compiled(*args)


def _medians_us(calls: list[Callable[[], Any]]) -> list[float]:
    """Medians over rounds that take the calls in turn, so that a slow moment of the machine falls on all alike."""
    once = []
    for call in calls:
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        once.append(max(time.perf_counter() - start, 1e-7))
    counts = [max(1, min(50, int(ROUND_S / seconds))) for seconds in once]
    number = max(MIN_ROUNDS, min(ROUNDS, int(BUDGET_S / sum(once))))
    rounds: list[list[float]] = [[] for _ in calls]
    for _ in range(number):
        for call, count, times in zip(calls, counts, rounds, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                jax.block_until_ready(call())
            times.append((time.perf_counter() - start) / count * 1e6)
    return [statistics.median(times) for times in rounds]
