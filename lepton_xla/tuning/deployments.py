"""The cheapest way to serve a model: target, recipe, buckets and replicas for the least money a million requests.

Times of calls are measured where there are measurements, and predicted by the target's compiler where it predicts
(TPU's does, as `optimal_seconds`; those for GPUs and CPUs do not). The search's estimates predict those of this
machine. What requests wait is simulated: Poisson arrivals, and a server that runs what waits, up to its largest bucket,
as soon as it is free. The network is not in it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import msgspec
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_xla import toml
from lepton_xla.errors import LeptonError, TuningError, first_line
from lepton_xla.program import Program
from lepton_xla.sharding.topologies import device_count, topology_devices

# Requests that are simulated, of which the first tenth is not looked at, and the most replicas that are tried.
_REQUESTS, _MOST_REPLICAS = 20_000, 1 << 14
# Rows of a call, of which the simulation knows each number; and what prices, times and rates are within.
_MOST_ROWS, _LEAST, _MOST = 1 << 20, 1e-6, 1e12
_EXPECTED = f"expected a number from {_LEAST:g} to {_MOST:g}"
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
CPU = "cpu"
_NO_TIMES = "XLA's compiler for CPUs predicts no times"

type Times = Mapping[int, float]
"""Rows of a call -> its microseconds."""


@dataclasses.dataclass(frozen=True)
class Slo:
    """What requests may take.

    Attributes:
        share: of the requests, such as 0.99.
        seconds: that they may take at most.

    >>> Slo.parse("p99=20ms")
    Slo(share=0.99, seconds=0.02)
    """

    share: float
    seconds: float

    @staticmethod
    def parse(text: str) -> Slo:
        """Read a text such as `p99=20ms`.

        Raises:
            TuningError: if it is none.
        """
        found = re.fullmatch(r"\s*p(\d{1,2}(?:\.\d+)?)\s*=\s*(\d+(?:\.\d+)?)\s*(us|ms|s)\s*", text)
        if found is None or not float(found[1]) > 0 or not float(found[2]) > 0:
            raise TuningError(f"{text!r}: expected a share of the requests and a time, such as p99=20ms")
        return Slo(float(found[1]) / 100, float(found[2]) * _SECONDS[found[3]])


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A time that was measured elsewhere: of a call of so many rows, with a recipe (`float` for none) on a target."""

    target: str
    recipe: str
    rows: int
    us: float


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of prices.

    Attributes:
        per_hour: target -> money an hour for what runs one replica; `cpu` is a machine like this one.
        currency: of all prices.
        measured: times that were measured elsewhere.

    >>> Prices.parse('[per_hour]\\ncpu = 0.2\\n"v5e:1x1" = 1.2').per_hour
    {'cpu': 0.2, 'v5e:1x1': 1.2}
    """

    per_hour: dict[str, float]
    currency: str = "USD"
    measured: list[Measured] = []

    @staticmethod
    def parse(text: str, where: str = "prices") -> Prices:
        """Read TOML.

        Raises:
            TuningError: if it is no such file, or a price, a time or a number of rows is none.
        """
        try:
            found = toml.parsed(text, Prices)
        except ValueError as error:
            raise TuningError(f"{where}: {error}") from error
        for name, value in [*found.per_hour.items(), *((each.target, each.us) for each in found.measured)]:
            if not _LEAST <= value <= _MOST:
                raise TuningError(f"{where}: {name} has {value}; {_EXPECTED}")
        for each in found.measured:
            if not 1 <= each.rows <= _MOST_ROWS:
                raise TuningError(f"{where}: {each.target} has rows = {each.rows}; expected 1 to {_MOST_ROWS:,}")
        return found

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Prices:
        """Read a file.

        Raises:
            TuningError: if it cannot be read.
        """
        try:
            return Prices.parse(pathlib.Path(path).read_text(encoding="utf-8"), os.fspath(path))
        except (OSError, UnicodeDecodeError) as error:
            raise TuningError(f"{os.fspath(path)}: cannot be read: {error}") from error


@dataclasses.dataclass(frozen=True)
class Deployment:
    """One way to serve a model.

    Attributes:
        target: what runs a replica.
        mesh: how a replica's devices share the rows of a batch; empty for one device.
        recipe: name of the recipe; `float` for none.
        buckets: numbers of rows to compile for.
        replicas: how many keep to the limit.
        seconds: what the share of the requests takes at most, simulated.
        per_million: money a million requests.
        source: where times of calls come from.
    """

    target: str
    mesh: str
    recipe: str
    buckets: tuple[int, ...]
    replicas: int
    seconds: float
    per_million: float
    source: Literal["measured", "predicted"]


@dataclasses.dataclass(frozen=True)
class Deployments:
    """What was found.

    Attributes:
        found: ways that keep to the limit, the cheapest first.
        refused: (target, recipe, why not).
        compared: (target, recipe, rows, predicted microseconds, measured microseconds), where both exist.
        currency: of the prices.
    """

    found: tuple[Deployment, ...]
    refused: tuple[tuple[str, str, str], ...]
    compared: tuple[tuple[str, str, int, float, float], ...]
    currency: str


def deploy(
    measured_here: Mapping[str, Times],
    predict: Callable[[str, str], Times],
    *,
    targets: Sequence[str],
    prices: Prices,
    slo: Slo,
    rate: float,
    seed: int = 0,
) -> Deployments:
    """Find the cheapest way to serve.

    Args:
        measured_here: recipe -> times of calls on this machine's CPU.
        predict: gives the predicted times of a recipe on a target, or raises a `TuningError` that says why it cannot.
        targets: `cpu`, and topologies such as `v5e:1x1` or `h100`.
        prices: what they cost.
        slo: what requests may take.
        rate: requests of one row a second.
        seed: of the simulated arrivals.

    Raises:
        TuningError: if a target has no price, or the rate is none.

    >>> found = deploy({"float": {1: 1e3, 8: 2e3}}, lambda target, recipe: {}, targets=["cpu"], rate=1500,
    ...                prices=Prices({"cpu": 0.36}), slo=Slo(0.99, 0.02)).found[0]
    >>> found.recipe, found.buckets, found.replicas, found.source, round(found.per_million, 3)
    ('float', (1, 8), 1, 'measured', 0.067)
    """
    if not _LEAST <= rate <= _MOST:
        raise TuningError(f"rate = {rate}, requests a second: {_EXPECTED}")
    without = [target for target in targets if target not in prices.per_hour]
    if without or not targets:
        priced = ", ".join(prices.per_hour) or "nothing"
        raise TuningError(f"there is no price of {', '.join(without) or 'no target'}; the prices are of {priced}")
    found: list[Deployment] = []
    refused: list[tuple[str, str, str]] = []
    compared: list[tuple[str, str, int, float, float]] = []
    for target, recipe in itertools.product(targets, measured_here):
        known: dict[int, float] = dict(measured_here[recipe]) if target == CPU else {}
        known |= {each.rows: each.us for each in prices.measured if (each.target, each.recipe) == (target, recipe)}
        try:
            predicted = predict(target, recipe)
        except TuningError as error:
            predicted = {}
            if not known:
                refused.append((target, recipe, str(error)))
                continue
        compared += [(target, recipe, rows, us, known[rows]) for rows, us in predicted.items() if rows in known]
        times, source = (known, "measured") if known else (predicted, "predicted")
        ways: list[Deployment] = []
        for largest in sorted(times):
            some = {rows: us for rows, us in times.items() if rows <= largest}
            fewest = fewest_replicas(some, rate, slo, seed=seed)
            if fewest is not None:
                replicas, seconds = fewest
                money = replicas * prices.per_hour[target] / (rate * 3600) * 1e6
                buckets = tuple(sorted(some))
                ways.append(Deployment(target, mesh_of(target), recipe, buckets, replicas, seconds, money, source))
        if ways:
            found.append(min(ways, key=lambda each: each.per_million))
        else:
            least = min(times.values(), default=math.inf) * 1e-6
            alone = f"a call alone takes {1e3 * least:.3g} ms: no number of replicas keeps to it"
            refused.append(
                (target, recipe, alone if least > slo.seconds else f"takes over {_MOST_REPLICAS:,} replicas")
            )
    for target, recipe in dict.fromkeys((each.target, each.recipe) for each in prices.measured):
        if target in targets and recipe not in measured_here:
            why = f"times of {recipe!r} are given, which is none of the recipes that hold: {', '.join(measured_here)}"
            refused.append((target, recipe, why))
    cheapest = sorted(found, key=lambda each: (each.per_million, each.seconds))
    return Deployments(tuple(cheapest), tuple(refused), tuple(compared), prices.currency)


def fewest_replicas(times: Times, rate: float, slo: Slo, *, seed: int = 0) -> tuple[int, float] | None:
    """The fewest replicas that keep to a limit, and what its share of requests then takes; None if none do.

    >>> fewest_replicas({1: 1000.0}, 1500, Slo(0.99, 0.02))[0]  # one does 1,000 a second
    2
    >>> fewest_replicas({1: 30_000.0}, 1, Slo(0.99, 0.02)) is None
    True
    """

    def taken(replicas: int) -> float:
        return float(np.quantile(simulated(times, rate / replicas, seed=seed), slo.share))

    high = 1
    while (seconds := taken(high)) > slo.seconds:
        if high >= _MOST_REPLICAS or times[min(times)] * 1e-6 > slo.seconds:
            return None
        high *= 2
    low = high // 2  # too few
    while high - low > 1:
        middle = (low + high) // 2
        at = taken(middle)
        low, high, seconds = (low, middle, at) if at <= slo.seconds else (middle, high, seconds)
    return high, seconds


def simulated(times: Times, rate: float, *, seed: int = 0, requests: int = _REQUESTS) -> np.ndarray:
    """Simulate one server.

    Args:
        times: of calls; the buckets.
        rate: of Poisson arrivals of one row, a second.
        seed: of the arrivals.
        requests: how many.

    Returns:
        Seconds from arrival to answer: float64 [requests], less the first tenth.
    """
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests))
    buckets = sorted(times)
    largest = buckets[-1]
    took = [times[next(size for size in buckets if size >= rows)] * 1e-6 for rows in range(1, largest + 1)]
    ends = np.empty(requests)
    free, at = 0.0, 0
    while at < requests:
        begin = max(free, float(arrivals[at]))
        waiting = int(np.searchsorted(arrivals[at : at + largest], begin, side="right"))
        rows = max(1, waiting)
        free = begin + took[rows - 1]
        ends[at : at + rows] = free
        at += rows
    return (ends - arrivals)[requests // 10 :]


def mesh_of(target: str) -> str:
    """How the devices of a target share a batch; empty for one device.

    >>> mesh_of("v5e:2x2"), mesh_of("v5e:1x1"), mesh_of("h100"), mesh_of("cpu")
    ('data=4', '', '', '')
    """
    counts = [int(each) for each in re.findall(r"\d+", target.partition(":")[2])]
    devices = math.prod(counts)
    return f"data={devices}" if devices > 1 else ""


def why_unknown(target: str, prices: Prices) -> str:
    """Why a target's compiler cannot predict times; empty if it may, or if the target has times that were measured.

    Raises:
        TuningError: if there is no such target, and nothing that was measured on it.

    >>> why_unknown("cpu", Prices({"cpu": 1.0}))
    "XLA's compiler for CPUs predicts no times"
    >>> why_unknown("a machine", Prices({"a machine": 1.0}))
    Traceback (most recent call last):
    lepton_xla.errors.TuningError: topology 'a machine:1': expected ...
    """
    if target == CPU:
        return _NO_TIMES
    try:
        topology_devices(_topology(target))
    except LeptonError as error:
        try:
            device_count(_topology(target))
        except LeptonError as other:
            if not any(each.target == target for each in prices.measured):
                raise TuningError(first_line(other)) from error
            return "what was not measured on it, no compiler predicts"
        return first_line(error)
    return ""


def _topology(target: str) -> str:
    return target if ":" in target else f"{target}:1"


def predicted_us(program: Program, sizes: Mapping[str, int], target: str) -> float:
    """Have a target's compiler predict the time of a call; its devices share the rows of a batch.

    Args:
        program: the program.
        sizes: of its symbolic dimensions.
        target: a topology such as `v5e:1x1`.

    Raises:
        TuningError: if the compiler is not here, cannot compile the program, or predicts nothing.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> predicted_us(program, {"batch": 1}, "no such thing:1x1")
    Traceback (most recent call last):
    lepton_xla.errors.TuningError: topology 'no such thing:1x1': ...
    """
    if target == CPU:
        raise TuningError(_NO_TIMES)
    try:
        mesh = Mesh(np.array(topology_devices(_topology(target))), ("data",))
        whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

        def placed(leaf: Any, sharding: NamedSharding) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        weights = jax.tree.map(lambda leaf: placed(leaf, whole), program.weights)
        inputs = [
            placed(each, split if each.shape and each.shape[0] % mesh.size == 0 else whole)
            for each in program.abstract_inputs(sizes)
        ]
        costs: Any = jax.jit(program.fn).lower(weights, *inputs).compile().cost_analysis()
    except LeptonError as error:
        raise TuningError(first_line(error)) from error
    except jax.errors.JaxRuntimeError as error:
        raise TuningError(f"the compiler of {target} refuses the program: {first_line(error)}") from error
    seconds = (costs or {}).get("optimal_seconds", 0.0)
    if not seconds > 0:
        raise TuningError(f"the compiler of {target} predicts no times, and nothing was measured")
    return 1e6 * float(seconds)
