"""Sensitivity to quantization: one weight at a time is quantized by a recipe's rule, the rest stays in float.

All measurements use one compiled program with a runtime switch per weight, so a model with a hundred sites is compiled
once.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla.arguments import takes
from lepton_xla.errors import CalibrationError, InputError, ModelError, RecipeError
from lepton_xla.modelspec import Predict
from lepton_xla.optimization.pipeline import plan_for
from lepton_xla.passes.core.calibration import as_batches, calibrate, check_batch, needs_range
from lepton_xla.passes.core.names import Key
from lepton_xla.passes.core.plans import Plan, SitePlan
from lepton_xla.passes.core.sites import Site, find_sites, operand_value, rewrite_sites, step_lengths
from lepton_xla.passes.core.timing import Timer
from lepton_xla.passes.core.walker import Context, Values
from lepton_xla.passes.quantization import eligibility
from lepton_xla.passes.quantization.fake_quantization import fake_quant
from lepton_xla.passes.quantization.integer_arithmetic import quantize
from lepton_xla.passes.quantization.measurement import Timing, compare
from lepton_xla.passes.quantization.products import RANGE
from lepton_xla.program import Program, TensorSpec
from lepton_xla.recipe import Recipe
from lepton_xla.trees import name_leaves

OUTPUT = "output"
"""The metric that needs no evaluation: the relative error of the outputs."""

type Progress = Callable[[str, int, int], None]
"""`progress(step, steps_done, steps_total)`."""

_ON = "on"


@dataclasses.dataclass(frozen=True)
class SiteSensitivity:
    """The effect of quantizing one weight.

    Attributes:
        sites: the sites that use the weight, which are quantized together, in the order of execution.
        decision: the recipe's rule in a few words.
        output_error: `|changed outputs - outputs| / |outputs|` over all calibration batches; None without calibration
            data.
        cosine: mean over examples of the cosine between the outputs before and after; None without calibration data.
        metrics: result of `evaluate`; empty if it was not run.
        drop: loss of the metric, in its own unit; negative if it improves. For `output`, the output error.
        bytes_before: bytes of the weight in float.
        bytes_after: bytes as the recipe stores it.
        timings: times of the product alone, in float and quantized; empty if not timed, or if it has no quantized
            product.

    >>> from lepton_xla.tuning import sensitivity
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> calibration = [{"x": np.ones((2, 4), np.float32)}]
    >>> (site,) = sensitivity(program, lx.Recipe.load("int8-weight-only"), calibration=calibration).sites
    >>> site.bytes_saved, site.latency_ratio, site.to_json()["decision"]
    (32, None, 'int8 weights')
    """

    sites: tuple[str, ...]
    decision: str
    output_error: float | None
    cosine: float | None
    metrics: dict[str, float]
    drop: float
    bytes_before: int
    bytes_after: int
    timings: tuple[Timing, ...] = ()

    @property
    def bytes_saved(self) -> int:
        """Bytes that quantizing the weight saves."""
        return self.bytes_before - self.bytes_after

    @property
    def latency_ratio(self) -> float | None:
        """Time of the quantized product over that of float, geometric mean over sizes; None if not timed."""
        ratios = [timing.best_us / timing.float_us for timing in self.timings]
        return math.prod(ratios) ** (1 / len(ratios)) if ratios else None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return {
            "site": self.sites[0] if self.sites else None,
            "sites": list(self.sites),
            "decision": self.decision,
            "drop": self.drop,
            "output_error": self.output_error,
            "cosine": self.cosine,
            "metrics": self.metrics,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_saved": self.bytes_saved,
            "latency_ratio": self.latency_ratio,
            "timings": [timing.to_json() for timing in self.timings],
        }


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The effect of quantizing each weight alone, and all of them together.

    Attributes:
        recipe: the recipe's name.
        metric: the metric of `drop`: `output`, or a metric of `evaluate`.
        float_metrics: result of `evaluate` on the float model; empty if it was not run.
        sites: one entry per weight, the most sensitive first.
        together: all weights quantized; the drop can be more or less than the sum of the single ones.
        kept: site -> why it stays in float although the recipe matches it.
        seconds: the time it took.

    >>> from lepton_xla.tuning import sensitivity
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> calibration = [{"x": np.ones((2, 4), np.float32)}]
    >>> found = sensitivity(program, lx.Recipe.load("int8-weight-only"), calibration=calibration)
    >>> found.metric, found.to_json()["recipe"]
    ('output', 'int8-weight-only')
    """

    recipe: str
    metric: str
    float_metrics: dict[str, float]
    sites: tuple[SiteSensitivity, ...]
    together: SiteSensitivity
    kept: dict[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return {
            "recipe": self.recipe,
            "metric": self.metric,
            "float": self.float_metrics,
            "sites": [entry.to_json() for entry in self.sites],
            "together": self.together.to_json(),
            "kept": self.kept,
            "seconds": self.seconds,
        }


@takes(program=Program, recipe=Recipe, evaluate=Callable)
def sensitivity(
    program: Program,
    recipe: Recipe,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    evaluate: Callable[[Predict], Mapping[str, float]] | None = None,
    metric: str | None = None,
    lower_is_better: bool = False,
    sizes: Sequence[Mapping[str, int]] = (),
    progress: Progress | None = None,
) -> Sensitivity:
    """Quantize one weight at a time and measures the effect.

    Pruning rules of the recipe are ignored. All sites of a weight, and all steps of a stacked weight, are quantized
    together, as the recipe would.

    Args:
        program: a trained model.
        recipe: its `[[quantize]]` rules are applied.
        calibration: input dicts, such as `[{"image": array}]`, all held in memory: for the output error and for static
            activation scales.
        evaluate: `evaluate(predict) -> {"accuracy": 0.98, ...}`, called once for the float model, once for each
            weight, and once for all together.
        metric: `output`, or a metric of `evaluate`. By default `accuracy` if there is one, else the first metric, else
            `output`.
        lower_is_better: whether the metric is a loss.
        sizes: sizes of the symbolic dimensions, such as `[{"batch": 1}]`, at which each product is timed alone.
        progress: called as each step begins.

    Raises:
        RecipeError: if the recipe does not fit the program, or quantizes nothing.
        CalibrationError: if calibration data is needed and missing, or cannot be used.
        ModelError: if there is no such metric, or the float model's outputs are not finite or not floats.

    >>> from lepton_xla.tuning import sensitivity
    >>> weights = {"a": jnp.eye(2), "b": jnp.array([[1.0], [0.3]])}
    >>> program = lx.trace(lambda w, x: x @ w["a"] @ w["b"], weights, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> calibration = [{"x": np.ones((2, 2), np.float32)}]
    >>> found = sensitivity(program, lx.Recipe.load("int4-channel-weight-only"), calibration=calibration)
    >>> [site.sites for site in found.sites]  # the weight that suffers most comes first
    [('b',), ('a',)]
    """
    start = time.perf_counter()
    say = progress or (lambda _stage, _done, _total: None)
    batches = None if calibration is None else list(as_batches(calibration))
    judge = None if metric == OUTPUT else evaluate
    if metric not in (None, OUTPUT) and evaluate is None:
        raise ModelError(f"metric {metric!r} needs a model with evaluate; without one, use {OUTPUT!r}")
    if judge is None and not batches:
        raise CalibrationError("a model without evaluate needs calibration data, to measure the error of the outputs")
    say("find sites", 0, 0)
    program, plan = plan_for(program, recipe)
    groups = plan.quantized
    if not groups:
        raise RecipeError(f"recipe {recipe.name!r} quantizes no weight of this program")
    ranges = _ranges(program, plan, batches, say)
    switched = _Switched(program, plan, list(groups), ranges)
    alone = np.eye(len(groups), dtype=bool)
    settings = [np.zeros(len(groups), bool), *alone, np.ones(len(groups), bool)]
    names = ["the float model", *(group[0].site.name for group in groups.values()), "all sites"]
    total = len(settings) * (len(batches or ()) + (judge is not None))
    done = 0

    def step(what: str) -> None:
        nonlocal done
        say(what, done, total)
        done += 1

    errors = _output_errors(switched, settings, names, batches, step) if batches else None
    judged: list[dict[str, float]] = [{} for _ in settings]
    if judge is not None:
        for index, setting in enumerate(settings):
            step(f"evaluate {names[index]}")
            judged[index] = {str(key): float(value) for key, value in judge(switched.predict(setting)).items()}
    chosen = _metric(metric, judged[0], has_evaluate=judge is not None)
    say("measure bytes", 0, 0)
    sizes_bytes = _bytes(program, plan, ranges)
    timings = _timings(program, plan, sizes, say)

    def entry(index: int, group: Sequence[SitePlan], whole: bool = False) -> SiteSensitivity:
        error, cosine = errors[index] if errors is not None else (None, None)
        if chosen == OUTPUT:
            assert error is not None
            drop = error
        else:
            drop = (judged[0][chosen] - judged[index][chosen]) * (-1 if lower_is_better else 1)
        weights = [planned[0].site.name for planned in groups.values()] if whole else [group[0].site.name]
        before, after = (sum(sizes_bytes[name][side] for name in weights) for side in (0, 1))
        return SiteSensitivity(
            tuple(planned.site.name for planned in group),
            "all of them" if whole else group[0].describe(),
            error,
            cosine,
            judged[index],
            drop,
            before,
            after,
            () if whole else tuple(timings.get(group[0].site.name, ())),
        )

    entries = [entry(index, group) for index, group in enumerate(groups.values(), 1)]
    # NaN sorts first; ties are broken by output error.
    entries.sort(key=lambda one: (_worst_first(one.drop), _worst_first(one.output_error or 0.0)))
    everything = [planned for group in groups.values() for planned in group]
    kept = {entry.site.name: entry.not_quantized for entry in plan.sites if entry.not_quantized}
    pairs = [entry.site.name for entry in plan.sites if entry.quantize is not None and entry.site.path is None]
    kept |= dict.fromkeys(pairs, "a product of two activations; only weights are tested")
    return Sensitivity(
        recipe.name,
        chosen,
        judged[0],
        tuple(entries),
        entry(len(settings) - 1, everything, whole=True),
        kept,
        time.perf_counter() - start,
    )


def _worst_first(value: float) -> float:
    return -math.inf if math.isnan(value) else -value


def _ranges(
    program: Program, plan: Plan, batches: Sequence[Mapping[str, Any]] | None, say: Progress
) -> dict[str, jax.Array]:
    if not any(planned.quantize is not None and needs_range(planned.quantize) for planned in plan.sites):
        return {}
    if batches is None:
        raise CalibrationError(
            f"recipe {plan.recipe.name!r} has static activation scales (dynamic = false), which need calibration data"
        )
    say("calibrate", 0, 0)
    return calibrate(program, plan, batches)


def _metric(asked: str | None, judged: Mapping[str, float], *, has_evaluate: bool) -> str:
    if not has_evaluate:
        return OUTPUT
    if not judged:
        raise ModelError(f"evaluate returns no metric; use metric {OUTPUT!r}")
    if asked is None:
        return "accuracy" if "accuracy" in judged else next(iter(judged))
    if asked not in judged:
        raise ModelError(f"no metric {asked!r}: evaluate returns {', '.join(judged)}; {OUTPUT!r} is always available")
    return asked


class _Switched:
    """The program with one switch per weight, which turns its sites to quantized arithmetic."""

    def __init__(self, program: Program, plan: Plan, paths: Sequence[str], ranges: Mapping[str, jax.Array]) -> None:
        self.program = program
        self._paths = paths
        self._plan = plan
        self._ranges = ranges
        self._run = jax.jit(self._switched)

    def __call__(self, setting: np.ndarray, inputs: Sequence[jax.Array]) -> dict[str, jax.Array]:
        """Outputs by name.

        Args:
            setting: bool, one for each weight: whether its sites are quantized.
            inputs: arrays in call order.
        """
        return self._run(self.program.weights, jnp.asarray(setting), self._ranges, *inputs)

    def predict(self, setting: np.ndarray) -> Predict:
        """The program as a function for `evaluate`."""

        def predict(**inputs: Any) -> dict[str, np.ndarray]:
            specs = self.program.inputs
            if set(inputs) != set(specs):
                raise InputError(f"got inputs {sorted(inputs)}, but the model takes {sorted(specs)}")
            arrays = [_as_declared(name, spec, inputs[name]) for name, spec in specs.items()]
            return jax.device_get(self(setting, arrays))

        return predict

    def _switched(self, weights: Any, setting: jax.Array, ranges: Mapping[str, jax.Array], *inputs: Any) -> Any:
        side_inputs: dict[str, dict[Key, jax.Array]] = {}
        for planned in self._plan.sites:
            site = planned.site
            if site.path is None or site.path not in self._paths:
                continue
            on = setting[self._paths.index(site.path)]
            steps = step_lengths(site, self.program.weights[site.path].shape)
            own = side_inputs.setdefault(site.path, {})
            own[site.name, _ON] = jnp.broadcast_to(on, steps)
            if site.name in ranges:
                own[site.name, RANGE] = ranges[site.name]
        run = rewrite_sites(self.program.fn, self._rule, inline=True, on_unknown="keep", side_inputs=side_inputs)
        return name_leaves(run(weights, *inputs), single="output")

    def _rule(self, site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
        planned = self._plan[site.name]
        if planned is None or planned.quantize is None or site.weight_operand is None:
            return None
        side_inputs = values[site.weight_operand].side_inputs
        operands = [operand_value(value) for value in values]
        quantized = rounded_alone(planned, site, context, eqn, side_inputs.get((site.name, RANGE)))
        return lax.cond(side_inputs[site.name, _ON], quantized, lambda *arrays: context.bind(eqn, arrays), *operands)


def rounded_alone(
    planned: SitePlan, site: Site, context: Context, eqn: Any, absmax: jax.Array | None = None
) -> Callable[..., list[jax.Array]]:
    """A fake-quantized product, as a function of its operands."""
    side, path = site.weight_operand, site.path
    assert side is not None
    assert path is not None

    def product(weights: Mapping[str, jax.Array], *others: jax.Array) -> list[jax.Array]:
        return context.bind(eqn, [*others[:side], weights[path], *others[side:]])

    # The only site of a weight is named by the weight's path.
    only = dataclasses.replace(planned, site=dataclasses.replace(site, name=path, layout=()))
    ranges = {} if absmax is None else {path: absmax}

    def quantized(*operands: jax.Array) -> list[jax.Array]:
        plan = Plan(Recipe(), (only,))
        return fake_quant(product, plan, ranges)({path: operands[side]}, *operands[:side], *operands[side + 1 :])

    return quantized


def _as_declared(name: str, spec: TensorSpec, value: Any) -> jax.Array:
    dtype = jnp.dtype(spec.dtype)
    if hasattr(value, "dtype") and value.dtype != dtype:
        raise InputError(f"input {name!r} has dtype {value.dtype}, expected {dtype}")
    return jnp.asarray(np.asarray(value, dtype))


def _output_errors(
    switched: _Switched,
    settings: Sequence[np.ndarray],
    names: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    step: Callable[[str], None],
) -> list[tuple[float, float]]:
    """Relative error and mean cosine of the outputs, for each setting compared with the first."""
    specs = switched.program.outputs
    if not any(jnp.issubdtype(jnp.dtype(spec.dtype), jnp.floating) for spec in specs.values()):
        raise ModelError(f"the model has no float output to measure an error of: {', '.join(map(str, specs))}")
    compared = jax.jit(lambda before, after: _distances(specs, before, after))
    totals = np.zeros((len(settings), 4))
    for number, batch in enumerate(batches):
        inputs = check_batch(switched.program, batch, f"calibration batch {number}")
        before = None
        for index, setting in enumerate(settings):
            step(f"run {names[index]}")
            after = switched(setting, inputs)
            before = after if before is None else before
            totals[index] += np.asarray(compared(before, after), np.float64)
        if not np.isfinite(totals[0]).all():
            raise ModelError(f"the model's outputs on calibration batch {number} are not finite")
    different, size, cosines, rows = totals.T
    with np.errstate(divide="ignore", invalid="ignore"):  # if all outputs are zero, any difference is infinite
        relative = np.where(different == 0, 0.0, np.sqrt(different / size))
    return list(zip(relative.tolist(), (cosines / rows).tolist(), strict=True))


def _distances(
    specs: Mapping[str, TensorSpec], before: Mapping[str, jax.Array], after: Mapping[str, jax.Array]
) -> jax.Array:
    """Squared norm of the difference, squared norm before, sum of cosines of examples, number of examples: float32[4].

    The first axis of an output counts examples if it is symbolic; otherwise the whole output is one example.
    """
    totals = jnp.zeros(4, jnp.float32)
    for name, spec in specs.items():
        if not jnp.issubdtype(before[name].dtype, jnp.floating):
            continue
        rows = before[name].shape[0] if spec.shape and isinstance(spec.shape[0], str) else 1
        first, second = (side[name].astype(jnp.float32).reshape(rows, -1) for side in (before, after))
        norms = jnp.linalg.norm(first, axis=1) * jnp.linalg.norm(second, axis=1)
        same = jnp.all(first == second, axis=1)
        cosines = jnp.where(same, 1.0, jnp.sum(first * second, axis=1) / jnp.where(norms > 0, norms, 1.0))
        parts = [jnp.sum((second - first) ** 2), jnp.sum(first**2), jnp.sum(cosines), jnp.float32(rows)]
        totals = totals + jnp.stack(parts)
    return totals


def _bytes(program: Program, plan: Plan, ranges: Mapping[str, jax.Array]) -> dict[str, tuple[int, int]]:
    """Bytes of each site's weight in float, and as `quantize` stores it."""
    report = quantize(program, plan, ranges).history[-1]
    return {site.site: (site.bytes_before, site.bytes_after) for site in report.sites}


def _timings(
    program: Program, plan: Plan, sizes: Sequence[Mapping[str, int]], say: Progress
) -> dict[str, list[Timing]]:
    """Time each product alone, in float and quantized, if it has a quantized form."""
    rules = {entry.site.name: entry.quantize for group in plan.quantized.values() for entry in group if entry.quantize}
    timings: dict[str, list[Timing]] = {}
    timer = Timer()
    for number, at in enumerate(sizes):
        say("time products", number, len(sizes))
        found = [(site, rules[site.name], at) for site in find_sites(program, sizes=at) if site.name in rules]
        wanted = [
            (site, rule, at)
            for site, rule, at in found
            if rule.activations != "none" and not eligibility.float_reason(site, rule, timer.target)
        ]
        for (site, _, _), timing in zip(wanted, compare(wanted, timer), strict=True):
            timings.setdefault(site.name, []).append(timing)
    return timings
