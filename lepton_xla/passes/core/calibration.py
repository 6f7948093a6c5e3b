"""Measures ranges of activations at planned sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.errors import CalibrationError
from lepton_xla.passes.core.names import Key
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.precomputation import for_plan
from lepton_xla.passes.core.sites import Site, rewrite_sites, step_lengths
from lepton_xla.passes.core.walker import Context, Values, materialize
from lepton_xla.program import Program
from lepton_xla.quant import FORMATS, observers
from lepton_xla.quant.observers import Aggregate, Histogram
from lepton_xla.recipe import QuantizeRule

if TYPE_CHECKING:
    from jaxtyping import Array, Float32

# Side inputs of a weight: a one-hot mark of the step, and the level of the histogram. Then the names of taps.
_MARK, _LEVEL = "mark", "level"
_LARGEST, _COUNTS = "largest", "counts"
_FINITE = np.float32(np.finfo(np.float32).max).view(np.int32)

# Message for empty calibration data.
EMPTY = (
    "calibration data is empty: give at least one batch, such as [{'image': array}]; a generator gives its batches "
    "only once"
)


@takes(program=Program, plan=Plan)
def calibrate(
    program: Program, plan: Plan, batches: Iterable[Mapping[str, Any]]
) -> dict[str, Float32[Array, "*steps"]]:
    """Measure the range of each statically quantized site's activation, in one pass over the data.

    Holds one batch at a time, and a histogram of fixed size for each site and step. A batch with larger magnitudes than
    all before it is run again, with histograms that cover them.

    Args:
        program: the float program that the plan was made for.
        plan: gives the sites, how to choose each range (`calibration`), and how to combine batches (`aggregate`).
        batches: input dicts, such as `{"image": array}`; at least one.

    Returns:
        Site name -> float32 range, positive; a scalar, or one per step if a scan steps over the site's weight.

    Raises:
        CalibrationError: if there are no batches, or one has a wrong name, dtype or shape, is empty or not finite; if a
            site is not reached, or by zeros only, so that it has no range; or if the method is not defined for its
            format.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> plan = lx.passes.resolve(lx.Recipe.load("int8").replace({"quantize.0.dynamic": False}), program)
    >>> lx.passes.calibrate(program, plan, [{"x": np.float32([[1.0, -3.0, 2.0, 0.0]])}])
    {'w': Array(3., dtype=float32)}
    """
    program = for_plan(program, plan)
    sites = {
        planned.site.name: (planned.site, planned.quantize)
        for planned in plan.sites
        if planned.quantize is not None and needs_range(planned.quantize)
    }
    observe = _observer(program, sites)
    watched = {name: _SiteObserver.of(program, site, rule) for name, (site, rule) in sites.items()}
    levels: dict[str, np.ndarray] = {}
    number = 0
    for number, batch in enumerate(as_batches(batches), 1):
        inputs = check_batch(program, batch, f"calibration batch {number - 1}")
        largest, counts, levels = observe(inputs, levels)
        for name in largest:
            if not (largest[name] <= _FINITE).all():
                raise CalibrationError(f"the activation of site {name!r} is not finite on the calibration data")
            watched[name].add(largest[name], counts.get(name), levels.get(name))
    if number == 0:
        raise CalibrationError(EMPTY)
    return {name: jnp.asarray(watcher.result(name)) for name, watcher in watched.items()}


type _Sites = Mapping[str, tuple[Site, QuantizeRule]]
type _Arrays = dict[str, np.ndarray]


def _observer(
    program: Program, sites: _Sites
) -> Callable[[Sequence[jax.Array], _Arrays], tuple[_Arrays, _Arrays, _Arrays]]:
    """Run the program on inputs and give, by site, the bits of the largest magnitudes, the counts, and the levels
    that they were counted at; each with the axes of the site's steps leading."""
    counted = [name for name, (_, rule) in sites.items() if observers.counts_needed(rule.calibration)]

    def rule(site: Site, context: Context, eqn: Any, values: Values) -> None:
        del eqn
        if site.name not in sites or site.weight_operand is None:
            return
        activation = materialize(values[1 - site.weight_operand])
        side_inputs = values[site.weight_operand].side_inputs
        here = side_inputs[site.name, _MARK]
        context.tap((site.name, _LARGEST), here * observers.largest_bits(activation))
        if site.name in counted:
            counts = observers.count(activation, side_inputs[site.name, _LEVEL])
            counts = jnp.multiply.outer(here.astype(jnp.uint32), counts)
            context.tap((site.name, _COUNTS), counts, combine="sum")

    # The shape of a tap does not tell which of the surrounding scans step over the weight. So a mark of the step is a
    # side input of the weight: zeros of the shape of all steps, with a one at this step.
    marks: dict[str, dict[Key, jax.Array]] = {}
    for name, (site, _) in sites.items():
        assert site.path is not None
        steps = _steps(program, site)
        marks.setdefault(site.path, {})[name, _MARK] = jnp.eye(math.prod(steps), dtype=jnp.int32).reshape(
            (*steps, *steps)
        )

    @jax.jit
    def run(weights: Any, levels: Mapping[str, jax.Array], inputs: Sequence[jax.Array]) -> dict[str, jax.Array]:
        side_inputs: dict[str, dict[Key, jax.Array]] = {path: dict(at) for path, at in marks.items()}
        for name, level in levels.items():
            side_inputs[str(sites[name][0].path)][name, _LEVEL] = level
        tapped = rewrite_sites(program.fn, rule, inline=True, side_inputs=side_inputs, with_taps=True)
        return tapped(weights, *inputs)[1]

    def observe(inputs: Sequence[jax.Array], levels: _Arrays) -> tuple[_Arrays, _Arrays, _Arrays]:
        levels = levels or {name: np.zeros(_steps(program, sites[name][0]), np.int32) for name in counted}
        again = False
        while True:
            taps = jax.device_get(run(program.weights, levels, inputs))
            largest = {
                # Scans that do not step over the weight are stacked in front.
                name: np.max(found, axis=tuple(range(found.ndim - site.stacked)))
                for name, (site, _) in sites.items()
                if (found := taps.get((name, _LARGEST))) is not None
            }
            needed = {
                name: _next_level(
                    levels[name],
                    np.asarray(observers.level_of(bits)),
                    # A repeated run may only raise levels, so that different rounding cannot make it oscillate.
                    grow=again or sites[name][1].aggregate == "pooled",
                )
                for name, bits in largest.items()
                if name in counted
            }
            if all(np.array_equal(levels[name], level) for name, level in needed.items()):
                counts = {name: taps[name, _COUNTS] for name in needed}
                return largest, counts, levels
            levels, again = levels | needed, True

    return observe


def _next_level(level: np.ndarray, needed: np.ndarray, *, grow: bool) -> np.ndarray:
    """Choose the level: a histogram of one batch uses that batch's level, a pooled one that of all batches so far."""
    if grow:
        return np.maximum(level, needed)
    return np.where(needed > 0, needed, level)  # a step that is not reached keeps its level


def _steps(program: Program, site: Site) -> tuple[int, ...]:
    assert site.path is not None
    return step_lengths(site, program.weights[site.path].shape)


class _SiteObserver:
    """The magnitudes observed at one site, by step."""

    def __init__(self, rule: QuantizeRule, steps: tuple[int, ...]) -> None:
        self.rule = rule
        self.steps = steps
        self.pooled = {step: Histogram() for step in np.ndindex(steps)}
        self.aggregate = Aggregate.empty(rule.aggregate, steps)

    @classmethod
    def of(cls, program: Program, site: Site, rule: QuantizeRule) -> _SiteObserver:
        """Make the observer of a site."""
        return cls(rule, _steps(program, site))

    def add(self, largest: np.ndarray, counts: np.ndarray | None, levels: np.ndarray | None) -> None:
        """Add a batch."""
        seen: dict[tuple[int, ...], Histogram] = {}
        for step in self.pooled:
            absmax = np.asarray(largest[step]).view(np.float32).item()
            if counts is None or levels is None:
                seen[step] = Histogram(absmax=absmax)
            else:
                seen[step] = Histogram.of_counts(counts[step], levels[step], absmax)
        if self.rule.aggregate == "pooled":
            self.pooled = {step: self.pooled[step] + one for step, one in seen.items()}
        else:
            self.aggregate = self.aggregate.add(self._ranges(seen))

    def result(self, name: str) -> np.ndarray:
        """Return the float32 ranges, in the shape of the steps.

        Raises:
            CalibrationError: if there is none.
        """
        value = self._ranges(self.pooled) if self.rule.aggregate == "pooled" else self.aggregate.value
        value = value.astype(np.float32)
        if not (value > 0).all():
            raise CalibrationError(
                f"site {name!r} has no range on the calibration data: it is not reached, or by zeros only (or by so "
                f"many that {self.rule.calibration} falls on them){_some_steps(value)}; give data that reaches it, or "
                f"dynamic = true"
            )
        return value

    def _ranges(self, seen: Mapping[tuple[int, ...], Histogram]) -> np.ndarray:
        target = FORMATS[self.rule.activations]
        found = [observers.estimate_range(self.rule.calibration, one, target) for one in seen.values()]
        return np.asarray(found, np.float64).reshape(self.steps)


def _some_steps(value: np.ndarray) -> str:
    if value.ndim == 0:
        return ""
    steps = np.argwhere(value <= 0)
    return f", at step {', '.join('/'.join(map(str, step)) for step in steps[:4].tolist())} of its scan"


def needs_range(rule: QuantizeRule) -> bool:
    """Whether a rule asks for calibration data."""
    return rule.activations != "none" and not rule.dynamic


def as_batches(calibration: Any) -> Iterable[Any]:
    """Check that a caller's calibration data is iterable.

    Raises:
        CalibrationError: if it is a single batch instead of a list of batches, or not iterable.
    """
    if isinstance(calibration, Mapping | str) or not isinstance(calibration, Iterable):
        kind = type(calibration).__name__
        raise CalibrationError(f"calibration data is a {kind}, not a list of batches such as [{{'image': array}}]")
    return calibration


def check_batch(program: Program, batch: Mapping[str, Any], where: str) -> Sequence[jax.Array]:
    """Return a batch's arrays in call order, checked against the program's inputs.

    Raises:
        CalibrationError: if a name, dtype, rank or size is wrong, or an array is empty or not finite.
    """
    if not isinstance(batch, Mapping):
        raise CalibrationError(f"{where} is a {type(batch).__name__}, not a dict such as {{'image': array}}")
    if set(batch) != set(program.inputs):
        raise CalibrationError(
            f"{where} has inputs {sorted(map(str, batch))}; the program takes {sorted(program.inputs)}"
        )
    sizes: dict[str, int] = {}
    arrays = []
    for name, spec in program.inputs.items():
        try:
            array = np.asarray(batch[name])
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"{where}, input {name!r} is not an array: {error}") from error
        expected = f"{where}, input {name!r}: expected {spec}, got {array.dtype}[{', '.join(map(str, array.shape))}]"
        if array.dtype.name != spec.dtype or array.ndim != len(spec.shape):
            raise CalibrationError(expected)
        for dim, size in zip(spec.shape, array.shape, strict=True):
            if size != (sizes.setdefault(dim, size) if isinstance(dim, str) else dim):
                raise CalibrationError(expected)
        if array.size == 0:
            raise CalibrationError(f"{where}, input {name!r} is empty")
        if array.dtype.kind not in "biu" and not np.isfinite(array.astype(np.float32)).all():
            raise CalibrationError(f"{where}, input {name!r} holds NaN or infinity")
        arrays.append(jnp.asarray(array))
    return arrays
