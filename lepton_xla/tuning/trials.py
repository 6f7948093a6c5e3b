"""Trials: a recipe that was built and measured whole."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lepton_xla.compiler.weights import stored_bytes
from lepton_xla.errors import LeptonError, TuningError, first_line
from lepton_xla.modelspec import Predict
from lepton_xla.optimization.pipeline import apply_plan, optimize, plan_for
from lepton_xla.passes.core.calibration import check_batch
from lepton_xla.passes.core.timing import Timer, time_programs
from lepton_xla.program import Program, probe_sizes
from lepton_xla.recipe import Recipe, to_toml
from lepton_xla.trees import abstract, name_leaves, tree_bytes
from lepton_xla.tuning.constraints import Constraints, Objective
from lepton_xla.tuning.digests import digest_of, digest_of_function
from lepton_xla.tuning.judging import Drop, Judge
from lepton_xla.tuning.operations import Operations
from lepton_xla.tuning.pacing import TimeUpError


@dataclasses.dataclass(frozen=True)
class Trial:
    """What was measured of one recipe.

    Attributes:
        name: the recipe's name.
        recipe: its TOML text.
        origin: where it came from: `preset`, `chosen`, `step back`, `step on` or `methods`; `trained` if it was
            trained, `stopped` if its training was not worth its end.
        choices: site -> what it became; empty for a preset.
        metrics: result of `evaluate` on all rows.
        judged: drop in points on the rows that candidates are chosen by.
        reported: drop on the other rows, with its interval; None if the recipe failed.
        output_error: relative error of the outputs.
        bytes: bytes of the weights on disk.
        memory: bytes of the weights in memory.
        operations: multiply-adds of a call at the smallest size, by weights that are not zero.
        us: microseconds of a call at each size.
        float_us: those of the float model, measured in turns with it.
        estimates: what was expected of `output_error`, `bytes`, `operations` and `latency` (share of float's); empty
            for a preset.
        seconds: time that the trial took.
        failure: why nothing was measured; empty if it was.
        training: how it was trained, by the names of `trainings.RANGES`; empty if it was not. Its recipe alone does not
            make it then.

    >>> from lepton_xla.tuning import Constraints, Trial
    >>> trial = Trial("a", "", "chosen", {}, judged=0.25, bytes=400, us=(50.0,), float_us=(100.0,), output_error=0.1)
    >>> trial.latency, trial.value("bytes"), trial.excess(Constraints(max_bytes=200))
    (0.5, 400.0, 1.0)
    >>> Trial.of_json(trial.to_json()) == trial
    True
    """

    name: str
    recipe: str
    origin: str
    choices: dict[str, str]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    judged: float = math.inf
    reported: Drop | None = None
    output_error: float = math.inf
    bytes: int = 0
    memory: int = 0
    operations: int = 0
    us: tuple[float, ...] = ()
    float_us: tuple[float, ...] = ()
    estimates: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    seconds: float = 0.0
    failure: str = ""
    training: dict[str, float] = dataclasses.field(default_factory=dict[str, float])

    @property
    def latency(self) -> float:
        """Time of a call as a share of float's, geometric mean over the sizes."""
        return (
            statistics.geometric_mean([a / b for a, b in zip(self.us, self.float_us, strict=True)]) if self.us else 1.0
        )

    def value(self, objective: Objective) -> float:
        """What is to be least."""
        values = {
            "latency": self.latency, "bytes": self.bytes, "memory": self.memory, "operations": self.operations,
            "metric": self.judged,
        }  # fmt: skip
        return math.inf if self.failure else float(values[objective])

    def excess(self, constraints: Constraints) -> float:
        """By how much the trial breaks the constraints, as shares of what is allowed added up; 0 if it keeps to all."""
        if self.failure:
            return math.inf
        found = 0.0
        if constraints.max_drop is not None and self.judged > constraints.max_drop + 1e-9:
            found += (self.judged - constraints.max_drop) / max(constraints.max_drop, 0.1)
        # Of several sizes, the one that takes too long by most.
        worst = max(
            (us / limit for us, limit in zip(self.us, constraints.latencies_us(len(self.us)), strict=True)), default=0.0
        )
        limits = (constraints.max_bytes, constraints.max_memory, constraints.max_operations)
        shares = [
            value / limit
            for value, limit in zip((self.bytes, self.memory, self.operations), limits, strict=True)
            if limit is not None
        ]
        shares.append(self.latency * (constraints.min_speedup or 0.0))
        return found + sum(share - 1 for share in (*shares, worst) if share > 1)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; None for what is infinite, which JSON lacks."""
        return _finite(
            {
                **dataclasses.asdict(self),
                "us": list(self.us),
                "float_us": list(self.float_us),
                "latency": self.latency,
            }
        )

    @staticmethod
    def of_json(found: Mapping[str, Any]) -> Trial:
        """The trial that `to_json` described."""
        given: dict[str, Any] = {key: value for key, value in found.items() if key != "latency"}
        drop = given.pop("reported")
        for key in ("judged", "output_error"):
            given[key] = math.inf if given[key] is None else given[key]
        for key in ("us", "float_us"):
            given[key] = tuple(given[key])
        reported = Drop(**drop) if drop else None
        if reported is not None and drop["low"] is None:
            reported = dataclasses.replace(reported, low=-math.inf, high=math.inf)
        return Trial(**given, reported=reported)


def _finite(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    return None if isinstance(found, float) and not math.isfinite(found) else found


class StoppedError(TuningError):
    """A training was stopped half way, because it had lost more than others had."""


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Builds and measures recipes for one model.

    Attributes:
        program: the float model.
        batches: calibration data.
        buckets: symbolic dimension -> sizes to compile for.
        sizes: all their combinations, at which calls are timed.
        judge: compares with the float model.
        timer: times calls.
    """

    program: Program
    batches: Sequence[Mapping[str, Any]]
    buckets: Mapping[str, Sequence[int]] | None
    sizes: Sequence[Mapping[str, int]]
    judge: Judge
    timer: Timer

    @property
    def smallest(self) -> Mapping[str, int]:
        """The sizes at which operations are counted: the least of each dimension."""
        return {name: min(at[name] for at in self.sizes) for name in self.sizes[0]}

    def measure(
        self,
        recipe: Recipe,
        max_drop: float | None,
        say: Callable[[str], None],
        *,
        train: Callable[[], Program] | None = None,
        **described: Any,
    ) -> Trial:
        """Build a recipe and measure it whole.

        Args:
            recipe: what to build.
            max_drop: what is allowed.
            say: called with a line when a step begins.
            train: gives trained weights, in place of the float model's.
            described: what the trial says of itself: `origin`, `choices`, `estimates`.

        Returns:
            The trial; one that failed says why.

        Raises:
            TimeUpError: if `say` or `train` does.
        """
        start = time.perf_counter()
        trial = Trial(recipe.name, to_toml(recipe), **described)
        try:
            how: dict[str, Any] = {
                "calibration": self.batches, "buckets": self.buckets, "timer": self.timer, "progress": say
            }  # fmt: skip
            planned, plan = plan_for(self.program if train is None else train(), recipe, **how)
            small = apply_plan(planned, plan, **how)
            loaded = as_loaded(small)
            say("evaluate")
            judged = self.judge(predictor(loaded), max_drop=max_drop)
            times: list[list[float]] = []
            for at in self.sizes:
                say("time calls")
                times.append(self._times(loaded, at))
        except TimeUpError:
            raise
        except StoppedError as error:
            seconds = time.perf_counter() - start
            return dataclasses.replace(trial, origin="stopped", failure=str(error), seconds=seconds)
        except (LeptonError, jax.errors.JaxRuntimeError) as error:
            return dataclasses.replace(trial, failure=first_line(error), seconds=time.perf_counter() - start)
        return dataclasses.replace(
            trial,
            metrics=judged.metrics,
            judged=judged.judged,
            reported=judged.reported,
            output_error=judged.output_error,
            bytes=stored_bytes(name_leaves(small.weights)),
            memory=tree_bytes(loaded.weights),
            operations=Operations.of(planned, self.smallest).by(small.weights),
            us=tuple(each[1] for each in times),
            float_us=tuple(each[0] for each in times),
            seconds=time.perf_counter() - start,
        )

    def build(self, trial: Trial, train: Callable[[Recipe], Program] | None = None) -> Program:
        """Build a trial's program.

        Args:
            trial: the trial.
            train: gives trained weights for its recipe, if it was trained.
        """
        recipe = Recipe.parse(trial.recipe, name=trial.name)
        program = self.program if train is None else train(recipe)
        return optimize(program, recipe, calibration=self.batches, buckets=self.buckets, timer=self.timer)

    def _times(self, small: Program, at: Mapping[str, int]) -> list[float]:
        functions = [(each.fn, each.weights) for each in (self.program, small)]
        return time_programs(functions, self.program.abstract_inputs(at), self.timer)


def as_loaded(program: Program) -> Program:
    """The program as an artifact runs it: with the weights that loading unpacks unpacked."""
    if program.expansion is None:
        return program
    return program.replace(fn=program.expansion.fn, weights=program.expansion.expand(program.weights), masks={})


def predictor(program: Program) -> Predict:
    """The program under `jax.jit`, with the call signature of a loaded artifact."""
    compiled = jax.jit(program.named_outputs)

    def predict(**inputs: Any) -> dict[str, np.ndarray]:
        arrays = check_batch(program, inputs, "the rows of evaluate")
        return jax.device_get(compiled(program.weights, *arrays))

    return predict


def digest(program: Program, batches: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Digests of a model and of its calibration data."""
    signature = repr((dict(program.inputs), dict(program.outputs)))
    sizes = probe_sizes(program.fn, program.weights, program.inputs)[0]
    computed = digest_of_function(program.fn, abstract(program.weights), *program.abstract_inputs(sizes))
    model = digest_of([name_leaves(program.weights)], after=signature + computed)
    return {"model": model[:16], "data": digest_of(batches)[:16]}
