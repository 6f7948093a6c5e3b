"""Times products and whole programs, in float and in codes, as compiled here, and checks the products of codes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.sites import Site
from lepton_xla.passes.core.timing import OPERATION_BUDGET_S, Lowered, Timer, random_array
from lepton_xla.passes.core.timing_cache import Times
from lepton_xla.passes.quantization import products
from lepton_xla.quant import FORMATS, absmax_scale, encode
from lepton_xla.quant.grid import decode

if TYPE_CHECKING:
    from lepton_xla.recipe import QuantizeRule

# A product of codes whose largest error is more than this share of the largest result is taken for wrong. Codes and
# scales are exact; what is left are the rounding of float32 and bfloat16, and codes that fall on the other side of a
# half.
WRONG = 0.05
# How often one program then computes a product: to start it takes longer than many a product.
REPEATS = 16


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median times of one site's product, in microseconds.

    Attributes:
        sizes: sizes of the symbolic dimensions.
        float_us: as the program had it.
        integer_us: with int8 operands.
        padded_us: with a single row padded to two, None where there are more.
        error: largest difference of the integer product from the float product of what the codes stand for, as a share
            of its largest value; NaN where the result holds one.
    """

    sizes: dict[str, int]
    float_us: float
    integer_us: float
    padded_us: float | None
    error: float = 0.0

    @property
    def wrong(self) -> bool:
        """Whether what was compiled does not compute the product: a compiler or a library has a fault there."""
        return not self.error <= WRONG

    def best_us(self, pad: bool) -> float:
        """The integer product's time, single rows padded or not."""
        return self.padded_us if pad and self.padded_us is not None else self.integer_us

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers."""
        return dataclasses.asdict(self)


def compare(site: Site, decision: QuantizeRule, sizes: Mapping[str, int], timer: Timer) -> Timing:
    """Time and check one site, found at the given sizes, on random operands; sites that look the same only once."""
    key = _Key(site, decision)
    return dataclasses.replace(timer.once(key, functools.partial(_compare, key, timer)), sizes=dict(sizes))


class _Key(Alike):
    """A site and its rule as far as its product's time depends on them."""

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

    prepare = jax.jit(functools.partial(_operands, key))
    like, like_rounded = jax.eval_shape(prepare, *site.operands)
    repeats = REPEATS if timer.target.queues else 1
    wanted = [(as_float, like_rounded), (functools.partial(_in_codes, key), like)]
    if products.row_count(site) == 1:
        wanted.append((functools.partial(_in_codes, key, pad=True), like))

    def measure(executables: list[Any]) -> Times:
        args, rounded = prepare(*(random_array(number, operand) for number, operand in enumerate(site.operands)))
        in_float, *in_codes = executables
        expected = in_float(*rounded)
        errors = [_share(call(*args), expected) for call in in_codes]
        # What the codes stand for takes as much time as what they were made from.
        calls = [functools.partial(in_float, *rounded), *(functools.partial(call, *args) for call in in_codes)]
        times = [time / repeats for time in timer.medians_us(calls, OPERATION_BUDGET_S)]
        worst = float(np.max(errors))
        return Times(times, worst if math.isfinite(worst) else None)

    times = timer.recall([Lowered.of(_repeated(fn, repeats), *given) for fn, given in wanted], measure)
    error = math.nan if times.error is None else times.error
    return Timing({}, times.us[0], times.us[1], times.us[2] if len(times.us) == 3 else None, error)


def _operands(key: _Key, *operands: jax.Array) -> tuple[tuple[Any, ...], list[jax.Array]]:
    """What a site's product of codes takes, and what these codes stand for."""
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


def _in_codes(key: _Key, *args: Any, pad: bool = False) -> jax.Array:
    """A site's product of codes, of what `_operands` gives."""
    if key.site.weight_operand is None:
        left, right = args
        return products.pair_product(key.site, left, right, key.rule.activations, pad_single=pad)
    act, stored, scale = args
    return products.code_product(key.site, act, stored, key.rule.activations, scale, pad_single=pad)


def _repeated(fn: Callable[..., jax.Array], times: int) -> Callable[..., jax.Array]:
    """A function that computes `fn` so often, each time anew."""

    def again(_: Any, result: jax.Array, args: Any) -> jax.Array:
        held, _ = jax.lax.optimization_barrier((args, result))  # else the compiler would compute it once
        return fn(*held)

    def repeated(*args: Any) -> jax.Array:
        return jax.lax.fori_loop(1, times, functools.partial(again, args=args), fn(*args))

    return repeated if times > 1 else fn


def _rounded(array: jax.Array, scale: jax.Array, name: str) -> jax.Array:
    """What the codes of an activation stand for, in its dtype."""
    return decode(encode(array, scale, FORMATS[name]), scale, FORMATS[name]).astype(array.dtype)


def _share(got: jax.Array, expected: jax.Array) -> float:
    """The largest difference, as a share of the largest value expected."""
    host, wanted = (np.asarray(array).astype(np.float32, copy=False) for array in (got, expected))
    if not host.size:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        apart = host - wanted
        largest = max(np.max(wanted), -np.min(wanted), np.float32(1e-30))
        return float(np.max(np.abs(apart, out=apart)) / largest)
