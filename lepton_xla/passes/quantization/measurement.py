"""Times products and whole programs, in float and in codes, as compiled here, and checks the products of codes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.sites import Site
from lepton_xla.passes.quantization import products
from lepton_xla.quant import FORMATS, absmax_scale, encode
from lepton_xla.quant.grid import decode

if TYPE_CHECKING:
    from lepton_xla.recipe import QuantizeRule

ROUNDS = 21
MIN_ROUNDS = 3
# Rounds are fewer where they would take longer than this in all: for whole programs, and for single operations, of
# which there are many.
BUDGET_S = 2.0
OPERATION_BUDGET_S = 0.5
# What takes this many times as long as the fastest is timed no further: after a single call where that is so long that
# the clock's noise does not count, else after the fewest rounds.
LOST = 3.0
LONG_S = 0.02
# A product of codes whose largest error is more than this share of the largest result is taken for wrong. Codes and
# scales are exact; what is left are the rounding of float32 and bfloat16, and codes that fall on the other side of a
# half.
WRONG = 0.05
# A round runs the product often enough to last this long, so that the clock's own cost does not count; where calls only
# queue work for a device, nor the wait for it.
ROUND_S = 2e-4
QUEUED_ROUND_S = 1e-2
# How many random values are drawn of an operand: to draw all of a large one takes longer than to time it. A prime.
DRAWN = 1_048_573
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


class Candidate:
    """A function that is timed, perhaps several times: with what it shares, a program is compiled once.

    Attributes:
        fn: `fn(weights, *inputs)`.
        compiled: executables by a digest of what XLA was given; one dict for all functions that may be the same.
    """

    def __init__(self, fn: Callable[..., Any], compiled: dict[str, Any]) -> None:
        self.fn = fn
        self.compiled = compiled

    def __call__(self, weights: Any, *inputs: Any) -> Any:
        """What the function gives."""
        return self.fn(weights, *inputs)


def time_programs(
    functions: Sequence[tuple[Callable[..., Any], Any]],
    inputs: Sequence[jax.ShapeDtypeStruct],
    budget_s: float = BUDGET_S,
) -> list[float]:
    """Median times in microseconds of functions of weights and the same inputs, timed in turn.

    Args:
        functions: pairs of `fn(weights, *inputs)` and its weights; a `Candidate` is not compiled where an equal one
            was before.
        inputs: shapes and dtypes; floats are drawn at random, anything else is zero.
        budget_s: seconds that timing takes about, at most; each function is called at least twice.
    """
    arrays = [
        _random(number, leaf)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else jnp.asarray(np.zeros(leaf.shape, leaf.dtype))
        for number, leaf in enumerate(inputs)
    ]
    executables = _all_compiled([(fn, (weights, *arrays)) for fn, weights in functions])
    calls = [
        functools.partial(executable, weights, *arrays)
        for executable, (_, weights) in zip(executables, functions, strict=True)
    ]
    return _medians_us(calls, budget_s)


def _all_compiled(functions: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """Executables of functions at arguments, compiled beside each other: XLA lets go of the interpreter meanwhile."""
    plain: dict[str, Any] = {}
    wanted: list[tuple[dict[str, Any], str]] = []
    missing: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
    for fn, args in functions:
        lowered = jax.jit(fn.fn if isinstance(fn, Candidate) else fn).lower(*args)
        known = fn.compiled if isinstance(fn, Candidate) else plain
        text = re.sub(r"^module @\S+", "module", lowered.as_text())
        digest = hashlib.sha256(text.encode()).hexdigest()
        wanted.append((known, digest))
        if digest not in known:
            missing.setdefault((id(known), digest), (known, digest, lowered))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda each: each[2].compile(), missing.values())
        for (known, digest, _), executable in zip(missing.values(), made, strict=True):
            known[digest] = executable
    return [known[digest] for known, digest in wanted]


def compare(site: Site, decision: QuantizeRule, sizes: Mapping[str, int]) -> Timing:
    """Times and checks one site, found at the given sizes, on random operands; sites that look the same only once."""
    return dataclasses.replace(_compare(_Key(site, decision)), sizes=dict(sizes))


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


@functools.lru_cache(maxsize=1024)
def _compare(key: _Key) -> Timing:
    site = key.site
    operands = [_random(number, operand) for number, operand in enumerate(site.operands)]

    def as_float(*operands: jax.Array) -> jax.Array:
        return _compat.bind(site.eqn, operands)[0]

    prepare = jax.jit(functools.partial(_operands, key))
    args, rounded = prepare(*operands)
    del operands  # what their codes stand for takes as much time, and a weight may be large
    repeats = REPEATS if _queues() else 1
    wanted = [(as_float, tuple(rounded)), (functools.partial(_in_codes, key), args)]
    if products.row_count(site) == 1:
        wanted.append((functools.partial(_in_codes, key, pad=True), args))
    in_float, *in_codes = _all_compiled([(_repeated(fn, repeats), given) for fn, given in wanted])
    expected = in_float(*rounded)
    errors = [_share(call(*args), expected) for call in in_codes]
    calls = [functools.partial(in_float, *rounded), *(functools.partial(call, *args) for call in in_codes)]
    times = [time / repeats for time in _medians_us(calls, OPERATION_BUDGET_S)]
    return Timing({}, times[0], times[1], times[2] if len(times) == 3 else None, float(np.max(errors)))


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
    return (act, stored, scale), rounded


def _in_codes(key: _Key, *args: Any, pad: bool = False) -> jax.Array:
    """A site's product of codes, of what `_operands` gives."""
    if key.site.weight_operand is None:
        left, right = args
        return products.pair_product(key.site, left, right, key.rule.activations, pad_single=pad)
    act, stored, scale = args
    return products.code_product(key.site, act, stored, key.rule.activations, scale, pad_single=pad)


def _queues() -> bool:
    """Whether a call only queues work for a device and returns."""
    return jax.default_backend() != "cpu"


def _repeated(fn: Callable[..., jax.Array], times: int) -> Callable[..., jax.Array]:
    """A function that computes `fn` so often, each time anew."""

    def again(_: Any, result: jax.Array, args: Any) -> jax.Array:
        held, _ = jax.lax.optimization_barrier((args, result))  # else the compiler would compute it once
        return fn(*held)

    def repeated(*args: Any) -> jax.Array:
        return jax.lax.fori_loop(1, times, functools.partial(again, args=args), fn(*args))

    return repeated if times > 1 else fn


def _random(seed: int, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Normal values, made on the host: JAX would compile its generator, and a cast, anew for each shape.

    Beyond `DRAWN` they are the same again, of which there is an odd number, so that they fill no two rows alike.
    """
    size = math.prod(like.shape)
    drawn = np.random.default_rng(seed).standard_normal(min(size, DRAWN), np.float32).astype(like.dtype)
    return jnp.asarray(np.resize(drawn, like.shape))


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


def _medians_us(calls: Sequence[Callable[[], Any]], budget_s: float = BUDGET_S) -> list[float]:
    """Medians over rounds that take the calls in turn, so that a slow moment of the machine falls on all alike.

    Where calls only queue work for a device, a turn waits for its last call alone: waiting for each would add the time
    to start a program to all of them and hide what the product takes.
    """
    queued = _queues()
    once: list[float] = []
    for call in calls:
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        once.append(max(time.perf_counter() - start, 1e-7))
    round_s = QUEUED_ROUND_S if queued else ROUND_S
    counts = [max(1, min(50, int(round_s / seconds))) for seconds in once]
    left = [index for index, seconds in enumerate(once) if seconds < max(LONG_S, LOST * min(once))]
    number = max(MIN_ROUNDS, min(ROUNDS, int(budget_s / sum(once[index] for index in left))))
    rounds: list[list[float]] = [[] for _ in calls]
    result = None
    for done in range(number):
        if done == MIN_ROUNDS:
            fastest = min(min(rounds[index]) for index in left)
            left = [index for index in left if min(rounds[index]) < LOST * fastest]
        for index in left:
            start = time.perf_counter()
            for _ in range(counts[index]):
                result = calls[index]()
                if not queued:
                    jax.block_until_ready(result)
            jax.block_until_ready(result)
            rounds[index].append((time.perf_counter() - start) / counts[index] * 1e6)
    return [statistics.median(times or [seconds * 1e6]) for times, seconds in zip(rounds, once, strict=True)]
