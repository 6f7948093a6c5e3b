"""Times compiled products in float and in codes, and checks the products of codes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.executables import Lowered
from lepton_xla.passes.core.sites import Site
from lepton_xla.passes.core.targets import Target
from lepton_xla.passes.core.timing import OPERATION_BUDGET_S, Timer, random_array
from lepton_xla.passes.core.timing_cache import Times
from lepton_xla.passes.quantization import products
from lepton_xla.quant import FORMATS, absmax_scale, encode
from lepton_xla.quant.grid import decode
from lepton_xla.recipe import QuantizeRule

# A product of codes is wrong if its largest error exceeds this share of the largest result. Codes and scales are exact,
# so legitimate errors are rounding of float32 and bfloat16, and codes that round the other way near a half.
WRONG = 0.05
# How often a timed program computes a product on such devices, because starting it takes longer than many a product.
REPEATS = 16


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median times of one site's product, in microseconds.

    Attributes:
        sizes: sizes of the symbolic dimensions.
        float_us: in float.
        integer_us: with quantized operands.
        padded_us: with a single row padded to two; None if there are more rows.
        error: largest difference between the integer product and the float product of the dequantized values, as a
            share of the largest value; NaN if the result holds NaN.
    """

    sizes: dict[str, int]
    float_us: float
    integer_us: float
    padded_us: float | None
    error: float = 0.0

    @property
    def wrong(self) -> bool:
        """Whether the compiled product is wrong, because of a fault in a compiler or a library."""
        return not self.error <= WRONG

    def best_us(self, pad: bool) -> float:
        """The time of the integer product, with or without padding of single rows."""
        return self.padded_us if pad and self.padded_us is not None else self.integer_us

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers."""
        return dataclasses.asdict(self)


def compare(site: Site, decision: QuantizeRule, sizes: Mapping[str, int], timer: Timer) -> Timing:
    """Time and check a site, found at the given sizes, on random operands; alike sites are measured once."""
    key = _Key(site, decision)
    return dataclasses.replace(timer.once(key, functools.partial(_compare, key, timer)), sizes=dict(sizes))


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


def _compare(key: _Key, timer: Timer) -> Timing:
    site = key.site

    def as_float(*operands: jax.Array) -> jax.Array:
        return _compat.bind(site.eqn, operands)[0]

    prepare = functools.partial(_operands, key)
    like, like_rounded = jax.eval_shape(prepare, *site.operands)
    repeats = REPEATS if timer.target.queues else 1
    in_codes = functools.partial(_in_codes, key, timer.target)
    wanted = [(as_float, like_rounded), (in_codes, like)]
    if products.row_count(site) == 1:
        wanted.append((functools.partial(in_codes, pad=True), like))

    def measure(executables: list[Any]) -> Times:
        in_float, *in_codes, prepared = executables
        args, rounded = prepared(*(random_array(number, operand) for number, operand in enumerate(site.operands)))
        expected = in_float(*rounded)
        errors = [_share(call(*args), expected) for call in in_codes]
        # The dequantized operands take the same time as the original ones.
        calls = [functools.partial(in_float, *rounded), *(functools.partial(call, *args) for call in in_codes)]
        times = [time / repeats for time in timer.medians_us(calls, OPERATION_BUDGET_S)]
        worst = float(np.max(errors))
        return Times(times, worst if math.isfinite(worst) else None)

    programs = [Lowered.of(_repeated(fn, repeats), *given) for fn, given in wanted]
    times = timer.recall(programs, measure, lambda: [Lowered.of(prepare, *site.operands)])
    error = math.nan if times.error is None else times.error
    return Timing({}, times.us[0], times.us[1], times.us[2] if len(times.us) == 3 else None, error)


def _operands(key: _Key, *operands: jax.Array) -> tuple[tuple[Any, ...], list[jax.Array]]:
    """Quantize operands: the arguments of a site's product of codes, and the dequantized operands."""
    site, rule = key.site, key.rule
    name = rule.activations
    if site.weight_operand is None:
        scales = products.pair_scales(site, operands[0], operands[1], name)
        return operands, [_rounded(operand, scale, name) for operand, scale in zip(operands, scales, strict=True)]
    weight, act = operands[site.weight_operand], operands[1 - site.weight_operand]
    stored = products.store(site, weight, rule.weights, rule.granularity)
    scale = None if rule.dynamic else absmax_scale(jnp.max(jnp.abs(act)), FORMATS[name])
    rounded = [_rounded(act, products.activation_scale(site, act, name, scale), name)]
    rounded.insert(site.weight_operand, products.restore(site, stored))
    return (act, products.for_product(stored) if site.kind == "dot_general" else stored, scale), rounded


def _in_codes(key: _Key, target: Target, *args: Any, pad: bool = False) -> jax.Array:
    """Compute a site's product of codes from the result of `_operands`."""
    if key.site.weight_operand is None:
        left, right = args
        return products.quantized_dot_pair(key.site, left, right, key.rule.activations, pad_single=pad, target=target)
    act, stored, scale = args
    return products.quantized_dot(key.site, act, stored, key.rule.activations, scale, pad_single=pad, target=target)


def _repeated(fn: Callable[..., jax.Array], times: int) -> Callable[..., jax.Array]:
    """Make a function that computes `fn` several times, without reuse of results."""

    def again(_: Any, result: jax.Array, args: Any) -> jax.Array:
        held, _ = jax.lax.optimization_barrier((args, result))  # otherwise the compiler would compute it once
        return fn(*held)

    def repeated(*args: Any) -> jax.Array:
        return jax.lax.fori_loop(1, times, functools.partial(again, args=args), fn(*args))

    return repeated if times > 1 else fn


def _rounded(array: jax.Array, scale: jax.Array, name: str) -> jax.Array:
    """Quantize and dequantize an activation, in its dtype."""
    return decode(encode(array, scale, FORMATS[name]), scale, FORMATS[name]).astype(array.dtype)


def _share(got: jax.Array, expected: jax.Array) -> float:
    """The largest difference, as a share of the largest expected value."""
    host, wanted = (np.asarray(array).astype(np.float32, copy=False) for array in (got, expected))
    if not host.size:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        apart = host - wanted
        largest = max(np.max(wanted), -np.min(wanted), np.float32(1e-30))
        return float(np.max(np.abs(apart, out=apart)) / largest)
