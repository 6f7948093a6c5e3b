"""Times compiled products in float and in codes, and checks the products of codes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from lepton_xla import _compat
from lepton_xla.kernels.keeping import Kept
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.executables import Candidate, Lowered
from lepton_xla.passes.core.matrix import weight_order
from lepton_xla.passes.core.sites import Site
from lepton_xla.passes.core.targets import Target
from lepton_xla.passes.core.timing import OPERATION_BUDGET_S, Measurement, Timer, random_array, random_values
from lepton_xla.passes.core.timing_cache import Times
from lepton_xla.passes.quantization import eligibility, products
from lepton_xla.quant import FORMATS, QTensor
from lepton_xla.quant.formats import Format
from lepton_xla.recipe import QuantizeRule

# A product of codes is wrong if its largest error exceeds this share of the largest result. Codes and scales are exact,
# so legitimate errors are rounding of float32 and bfloat16, and codes that round the other way near a half.
WRONG = 0.05
type Way = Literal["XLA", "padded", "kernel"]
"""How a product of codes is computed: by XLA, by XLA with a single row padded to two, by a kernel of this project."""

# How often a timed program computes a product on such devices, because starting it takes longer than many a product.
REPEATS = 16


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median times of one site's product, in microseconds.

    Attributes:
        sizes: sizes of the symbolic dimensions.
        float_us: in float.
        integer_us: with quantized operands; of a weight that alone is quantized, unpacking it each time.
        padded_us: with a single row padded to two; None if there are more rows.
        error: largest difference between the integer product and the float product of the dequantized values, as a
            share of the largest value; NaN if the result holds NaN.
        kernel_us: by a kernel; None if there is none.
        rows: number of rows of activations; 0 for a convolution.
    """

    sizes: dict[str, int]
    float_us: float
    integer_us: float
    padded_us: float | None
    error: float = 0.0
    kernel_us: float | None = None
    rows: int = 0

    @property
    def wrong(self) -> bool:
        """Whether the compiled product is wrong, because of a fault in a compiler or a library."""
        return not self.error <= WRONG

    @property
    def us(self) -> dict[Way, float]:
        """The times of the product of codes, by way."""
        found: dict[Way, float | None] = {"XLA": self.integer_us, "padded": self.padded_us, "kernel": self.kernel_us}
        return {way: time for way, time in found.items() if time is not None}

    @property
    def best_us(self) -> float:
        """The time of the product of codes in the fastest way."""
        return min(self.us.values())

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers."""
        return dataclasses.asdict(self)


def compare(wanted: Sequence[tuple[Site, QuantizeRule, Mapping[str, int]]], timer: Timer) -> list[Timing]:
    """Time and check sites, each found at the given sizes, on random operands; alike sites are measured once."""

    def measure(keys: list[_Key]) -> list[Timing]:
        times = timer.recall(_measurement(key, timer) for key in keys)
        return [_timing(key, each) for key, each in zip(keys, times, strict=True)]

    found = timer.once_all([_Key(site, rule) for site, rule, _ in wanted], measure)
    return [
        dataclasses.replace(timing, sizes=dict(at), rows=products.row_count(site))
        for timing, (site, _, at) in zip(found, wanted, strict=True)
    ]


class _Key(Alike):
    """The properties of a site and its rule that determine the time of its product."""

    def __init__(self, site: Site, decision: QuantizeRule) -> None:
        super().__init__(dataclasses.replace(site, layout=()))
        self.rule = decision
        self.facts = (
            *self.facts,
            decision.weights,
            decision.activations,
            decision.granularity,
            decision.dynamic,
        )


def _measurement(key: _Key, timer: Timer) -> Measurement:
    """Measure a product in float and in codes, and the error of the latter."""
    if key.rule.activations == "none":
        return _of_weight_only(key, timer)
    site = key.site

    def as_float(*operands: jax.Array) -> jax.Array:
        return _compat.bind(site.eqn, operands)[0]

    store = functools.partial(_stored, key)
    side = site.weight_operand
    like = _arguments(key, site.operands, None if side is None else jax.eval_shape(store, site.operands[side]))
    repeats = REPEATS if timer.target.queues else 1
    in_codes = functools.partial(_in_codes, key, timer.target)
    wanted = [(as_float, site.operands), (in_codes, like)]
    if products.row_count(site) == 1:
        wanted.append((functools.partial(in_codes, way="padded"), like))
    if eligibility.has_kernel(site, key.rule, timer.target):
        wanted.append((functools.partial(in_codes, way="kernel"), like))

    def measure(executables: list[Any]) -> Times:
        in_float, *coded = executables[: len(wanted)]
        operands = [_exact(key, side) for side in range(2)]
        args = _arguments(key, operands, None if side is None else executables[-1](operands[side]))
        expected = in_float(*operands)
        errors = [_share(call(*args), expected) for call in coded]
        calls = [functools.partial(in_float, *operands), *(functools.partial(call, *args) for call in coded)]
        with Kept(jax.tree.leaves(args)):
            times = [time / repeats for time in timer.medians_us(calls, OPERATION_BUDGET_S)]
        worst = float(np.max(errors))
        return Times(times, worst if math.isfinite(worst) else None)

    def untimed() -> list[Lowered]:
        if side is None:
            return []
        return [Lowered.of(Candidate(store, timer.once(_stored, dict)), site.operands[side])]

    return Measurement([Lowered.of(_repeated(fn, repeats), *given) for fn, given in wanted], measure, untimed)


def _of_weight_only(key: _Key, timer: Timer) -> Measurement:
    """Measure a product with a float weight, with a stored one that is unpacked each time, and by a kernel if any."""
    site, side = key.site, key.site.weight_operand
    assert side is not None

    def in_float(activation: jax.Array, weight: jax.Array) -> jax.Array:
        return _compat.bind(site.eqn, (activation, weight) if side == 1 else (weight, activation))[0]

    def prepare(weight: jax.Array) -> tuple[QTensor, jax.Array]:
        stored = products.store(site, weight, key.rule.weights, key.rule.granularity)
        return stored, products.restore(site, stored)

    def unpacking(activation: jax.Array, stored: QTensor) -> jax.Array:
        return in_float(activation, products.restore(site, stored))

    by_kernel = functools.partial(products.weight_only_dot, site)
    activation, weight = site.operands[1 - side], site.operands[side]
    stored, _ = jax.eval_shape(prepare, weight)
    wanted = [(in_float, weight), (unpacking, stored)]
    if eligibility.has_kernel(site, key.rule, timer.target):
        wanted.append((by_kernel, stored))

    def measure(executables: list[Any]) -> Times:
        *calls, preparing = executables
        given = random_array(1, activation)
        stored, restored = preparing(random_array(0, weight))
        operands = [(given, restored), *[(given, stored)] * (len(calls) - 1)]
        expected, got = calls[0](*operands[0]), calls[-1](*operands[-1])
        timed = [functools.partial(call, *of) for call, of in zip(calls, operands, strict=True)]
        error = _share(got, expected)
        return Times(timer.medians_us(timed, OPERATION_BUDGET_S), error if math.isfinite(error) else None)

    def untimed() -> list[Lowered]:
        return [Lowered.of(Candidate(prepare, timer.once(_of_weight_only, dict)), weight)]

    return Measurement([Lowered.of(fn, activation, given) for fn, given in wanted], measure, untimed)


def _timing(key: _Key, times: Times) -> Timing:
    error = math.nan if times.error is None else times.error
    in_float, by_xla, *others = times.us
    padded = others.pop(0) if key.rule.activations != "none" and products.row_count(key.site) == 1 else None
    return Timing({}, in_float, by_xla, padded, error, others[0] if others else None)


def _stored(key: _Key, weight: jax.Array) -> QTensor:
    """Quantize a weight, laid out for the product of codes."""
    stored = products.store(key.site, weight, key.rule.weights, key.rule.granularity)
    return products.for_product(stored) if key.site.kind == "dot_general" else stored


def _arguments(key: _Key, operands: Sequence[Any], stored: Any) -> tuple[Any, ...]:
    """The arguments of a site's product of codes for its operands, or for their shapes."""
    side = key.site.weight_operand
    if side is None:
        return tuple(operands)
    scale = None if key.rule.dynamic else np.float32(_unit(FORMATS[key.rule.activations]))
    return operands[1 - side], stored, scale


def _unit(target: Format) -> float:
    """A power of two that brings the largest code into [0.5, 1)."""
    return 2.0 ** -math.frexp(target.largest)[1]


def _exact(key: _Key, side: int) -> jax.Array:
    """Random values of an operand that quantizing does not change.

    They are multiples of `_unit`, and the largest code occurs in whatever may share a scale.
    """
    site, rule = key.site, key.rule
    weighted, is_weight = products.as_weighted(site), side == site.weight_operand
    target = FORMATS[rule.weights if is_weight else rule.activations]
    if site.weight_operand is None:
        summed = site.params["dimension_numbers"][0][side]
    else:
        summed = weight_order(site)[1] if is_weight else products.activation_axes(weighted)

    def on_grid(drawn: np.ndarray) -> np.ndarray:
        values = np.clip(drawn * (target.largest / 3), -target.largest, target.largest)
        return np.rint(values) if target.integer else values.astype(target.dtype).astype(np.float32)

    like = site.operands[side]
    values = random_values(side, like.shape, on_grid)
    values[tuple(slice(1 if axis in summed else None) for axis in range(values.ndim))] = target.largest
    values *= np.float32(_unit(target))
    return jax.device_put(values.astype(like.dtype, copy=False))


def _in_codes(key: _Key, target: Target, *args: Any, way: Way = "XLA") -> jax.Array:
    """Compute a site's product of codes from `_arguments`."""
    pad = way == "padded"
    if key.site.weight_operand is None:
        left, right = args
        return products.quantized_dot_pair(key.site, left, right, key.rule.activations, pad_single=pad, target=target)
    act, stored, scale = args
    if way == "kernel":
        return products.kernel_dot(key.site, act, stored, scale)
    return products.quantized_dot(key.site, act, stored, key.rule.activations, scale, pad_single=pad, target=target)


def _repeated(fn: Callable[..., jax.Array], times: int) -> Callable[..., jax.Array]:
    """Make a function that computes `fn` several times, without reuse of results."""

    def again(_: Any, result: jax.Array, args: Any) -> jax.Array:
        held, _ = jax.lax.optimization_barrier((args, result))  # otherwise the compiler would compute it once
        return fn(*held)

    def repeated(*args: Any) -> jax.Array:
        return jax.lax.fori_loop(1, times, functools.partial(again, args=args), fn(*args))

    return repeated if times > 1 else fn


def _share(got: jax.Array, expected: jax.Array) -> float:
    """The largest difference, as a share of the largest expected value."""
    host, wanted = (np.asarray(array).astype(np.float32, copy=False) for array in (got, expected))
    if not host.size:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        apart = host - wanted
        largest = max(np.max(wanted), -np.min(wanted), np.float32(1e-30))
        return float(np.max(np.abs(apart, out=apart)) / largest)
