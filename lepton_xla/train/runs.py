"""One run of the training loop: its steps, stages, evaluations and checkpoints."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lepton_xla.environment.machine import peak_flops
from lepton_xla.errors import TrainingError
from lepton_xla.launch.heartbeat import beat
from lepton_xla.program import Program
from lepton_xla.sharding import Rules
from lepton_xla.train.agreement import Agreement
from lepton_xla.train.checkpoints import CheckpointFolder
from lepton_xla.train.compression import Stage
from lepton_xla.train.evaluations import Evaluation, Predictor
from lepton_xla.train.feeding import Feed
from lepton_xla.train.layout import Layout, first_state, state_shapes, trace_step
from lepton_xla.train.models import Loss
from lepton_xla.train.placing import gathered, put, put_batch
from lepton_xla.train.preemption import Preempted, Preemption
from lepton_xla.train.state import State
from lepton_xla.train.steps import Metrics
from lepton_xla.train.telemetry import Telemetry

LOG = logging.getLogger(__name__)

# Steps that may wait on the device while the next one is prepared.
IN_FLIGHT = 2
# Times in a row that a run goes back to a checkpoint without getting further.
RESTORES = 3


@dataclasses.dataclass(frozen=True)
class Result:
    """What `fit` returns.

    Attributes:
        program: the trained program, with exact zeros and masks where it was pruned. Its weights are the best ones if
            the evaluation has a metric, else the moving averages if there are some, else the last ones.
        state: the state after the last step, where the mesh has it.
        trained: the part of the state that `program` and `quantized` are made of: the weights of `program`, model
            state, masks and trained scales. In a run of several processes it is whole in each.
        stage: the last stage of the compression; `stage.plan` and `quantized` store what was trained.
        metrics: mean metrics of the last logged steps.
        history: metrics of each evaluation, with its `step`.
        best_step: the step of the best evaluation; None if the evaluation has no metric.
        stopped: `steps`, or `patience` if the evaluation stopped the run.

    >>> import optax
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> batch = {"x": np.eye(2, dtype=np.float32), "label": np.array([1, 0])}
    >>> result = lx.train.fit(program, lx.train.supervised(program), optax.sgd(0.5), [batch], steps=20)
    >>> result.stopped, result.metrics["loss"] < 0.7
    ('steps', True)
    """

    program: Program
    state: State
    trained: State
    stage: Stage
    metrics: dict[str, float]
    history: tuple[dict[str, float], ...]
    best_step: int | None
    stopped: Literal["steps", "patience"]

    def quantized(self, **options: Any) -> Program:
        """Return the trained program with its weights as codes, as it was trained with `quantize_from`.

        Args:
            options: further arguments of `lx.passes.quantize`.

        Raises:
            TrainingError: if the run rounded nothing.

        >>> import optax
        >>> x = lx.TensorSpec(("batch", 2), "float32")
        >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": x})
        >>> batch = {"x": np.eye(2, dtype=np.float32), "label": np.array([1, 0])}
        >>> compression = lx.train.Compression("int8-weight-only", quantize_from=2)
        >>> result = lx.train.fit(
        ...     program, lx.train.supervised(program), optax.sgd(0.5), [batch], steps=4, compression=compression
        ... )
        >>> result.quantized().weights["w"].format
        'int8'
        """
        return self.stage.quantized(self.trained, **options)


class Run:
    """One call of `fit`."""

    def __init__(
        self,
        stage: Stage,
        feed: Feed,
        steps: int,
        mesh: Mesh | None,
        rules: Rules,
        local: bool,
        options: dict[str, Any],
        evaluation: Evaluation | None,
        folder: CheckpointFolder | None,
        preemption: Preemption,
        telemetry: Telemetry,
        on_nan: str,
        log_every: int,
    ) -> None:
        self._stage, self._feed, self._steps, self._mesh, self._rules = stage, feed, steps, mesh, rules
        self._local, self._options, self._evaluation, self._folder = local, options, evaluation, folder
        self._preemption, self._telemetry, self._on_nan, self._log_every = preemption, telemetry, on_nan, log_every
        self._step = 0
        self._best: float | None = None
        self._best_step: int | None = None
        self._stale = 0
        self._history: list[dict[str, float]] = []
        self._pending: list[Metrics] = []
        self._metrics: dict[str, float] = {}
        self._restores = 0
        self._went_back_to: int | None = None
        self._state: State
        self._layout: Layout
        self._compiled: Any = None
        self._arrays: Any = None
        self._flops = 0.0
        self._predictor: Predictor | None = None
        self._predicted: Stage | None = None
        self._mark = (0.0, 0)
        self._agreement = Agreement()

    def run(self, loss: Loss, optimizer: optax.GradientTransformation, key: jax.Array) -> Result:
        """Train to the end."""
        latest = None if self._folder is None else self._folder.latest()
        if latest is None:
            self._begin(key)
        else:
            self._resume(latest, loss, optimizer, key)
            self._evaluate_if_due()  # SIGTERM during an evaluation leaves a checkpoint without its result
        while self._step < self._steps and not self._is_stale:
            self._stop_if_asked()
            self._advance()
            self._evaluate_if_due()
            last = self._step == self._steps
            if self._folder is not None and (last or self._is_stale or self._step % self._folder.every == 0):
                self._save()
        self._look_back()
        if self._folder is not None:
            self._folder.wait()
        chosen = gathered(self._stage.essential(chosen_state(self._state, self._best_step is not None)))
        return Result(
            self._stage.finalize(chosen), self._state, chosen, self._stage, self._metrics, tuple(self._history),
            self._best_step, "patience" if self._is_stale else "steps",
        )  # fmt: skip

    # Beginnings.

    def _begin(self, key: jax.Array) -> None:
        fresh = self._fresh(key)
        shapes = state_shapes(self._stage, fresh)
        if self._folder is not None:
            self._folder.check(shapes)
        self._place(shapes)
        init = self._stage.optimizer.init
        if self._shardings is None:
            fresh = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), fresh)  # steps donate the state
            self._state = fresh.replace(optimizer=jax.jit(init)(fresh.weights))
        else:
            fresh = put(fresh, self._shardings.replace(optimizer=()))
            made = jax.jit(init, out_shardings=self._shardings.optimizer)(fresh.weights)
            self._state = fresh.replace(optimizer=made)

    def _resume(self, latest: int, loss: Loss, optimizer: optax.GradientTransformation, key: jax.Array) -> None:
        """Go on from a checkpoint. The stage is made first, since it decides the shapes."""
        assert self._folder is not None
        about, first = self._folder.about(latest), self._stage
        self._stage = Stage.resume(first.compression, first.whole, loss, optimizer, about["stage"])
        self._restore(latest, about, key)
        LOG.info("training goes on at step %d", self._step)

    def _restore(self, step: int, about: Mapping[str, Any], key: jax.Array) -> None:
        assert self._folder is not None
        self._place(state_shapes(self._stage, self._fresh(key)))
        self._state = self._folder.restore(step, self._layout.placed)
        self._step = step
        self._feed.seek(about["data"])
        self._best, self._best_step, self._stale = about["best"], about["best_step"], about["stale"]
        self._history = list(about["history"])
        self._pending.clear()
        self._compiled = None

    def _fresh(self, key: jax.Array) -> State:
        return first_state(self._stage, key, ema=self._options["ema"] is not None, best=self._keeps_best)

    def _place(self, shapes: State) -> None:
        """Find where each leaf of the state goes."""
        self._layout = Layout.of(self._stage, shapes, self._mesh, self._rules)
        self._placement, self._shardings = self._layout.placement, self._layout.shardings

    # One step.

    def _advance(self) -> None:
        # Data may be what hangs, also after an evaluation or a save, which may take longer.
        beat(self._step, "compile" if self._compiled is None else "data")
        batch = self._feed.next()
        prepare = getattr(self._stage.loss, "prepare", None)
        if prepare is not None:
            batch = {name: np.asarray(leaf) for name, leaf in prepare(batch).items()}
        if self._placement is not None and not self._local:
            self._placement.check_batch(batch)
        if self._stage.due(self._step):
            self._change_stage(batch)
        arrays = put_batch(batch, self._placement, local=self._local)
        compiled = self._compiled or self._compile(arrays)
        beat(self._step, "step")
        self._state, metrics = compiled(self._state, arrays, self._arrays)
        self._step += 1
        self._pending.append(metrics)
        if len(self._pending) > IN_FLIGHT:
            jax.block_until_ready(self._pending[-1 - IN_FLIGHT])
        # What is due is read when the device has its next step already, so that it does not wait meanwhile.
        if len(self._pending) > 1 and (self._step - 1) % self._log_every == 0:
            self._look_back(last=1)

    def _change_stage(self, batch: Mapping[str, np.ndarray]) -> None:
        """Begin the next stage of the compression: weights may be smaller, and the step is compiled anew."""
        self._look_back()
        beat(self._step, "compile")
        start = time.perf_counter()
        self._stage, state = self._stage.advance(self._state, batch)
        self._place(state)
        self._state = state if self._shardings is None else put(state, self._shardings)
        self._compiled = None
        self._telemetry.record(self._step, {"seconds": time.perf_counter() - start}, kind="stage")

    def _compile(self, batch: Mapping[str, jax.Array]) -> Any:
        beat(self._step, "compile")
        loss = self._stage.loss
        self._arrays = getattr(loss, "arrays", None)
        if self._shardings is not None and self._arrays is not None:
            self._arrays = put(self._arrays, jax.tree.map(lambda _: self._shardings.step, self._arrays))
        platform = jax.local_devices()[0].platform
        traced = trace_step(
            self._stage, self._layout, self._state, batch, self._arrays, platform=platform, **self._options
        )
        self._compiled = traced.lower().compile()
        self._flops = float((self._compiled.cost_analysis() or {}).get("flops", 0.0))
        self._mark = (time.perf_counter(), self._step)
        return self._compiled

    def _look_back(self, last: int = 0) -> None:
        """Read the metrics of the steps since the last look, but of the `last` ones, and log their means."""
        count, step = len(self._pending) - last, self._step - last
        if count <= 0:
            return
        read = [dict(zip(each.names, each.values, strict=True)) for each in jax.device_get(self._pending[:count])]
        del self._pending[:count]
        bad = [index for index, each in enumerate(read) if not each["finite"]]
        good = [each for each in read if each["finite"]] or read
        means = {name: float(np.mean([each[name] for each in good])) for name in good[0] if name != "finite"}
        now, (then, since) = time.perf_counter(), self._mark
        rate = (step - since) / max(now - then, 1e-9)
        self._mark = (now, step)
        self._metrics = means
        more = {"steps_per_s": rate}
        peak = peak_flops(jax.local_devices()[0].device_kind)
        if peak:
            more["peak_share"] = self._flops * rate / peak
        if bad:
            more["not_finite"] = float(len(bad))
        self._telemetry.record(step, means | more, kind="train")
        if bad:
            self._on_not_finite(step - count + bad[0], read[bad[0]])

    def _on_not_finite(self, step: int, metrics: Mapping[str, Any]) -> None:
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        text = f"step {step}: the loss is {loss}, the norm of the gradients {norm}"
        if self._on_nan == "skip":
            LOG.warning("%s; the step changed nothing", text)
            return
        latest = None if self._folder is None else self._folder.latest()
        if self._on_nan == "stop" or latest is None:
            raise TrainingError(
                f"{text}. The weights are those before it. Lower the learning rate, clip gradients (clip_norm), or "
                f"pass over such steps (on_nan='skip')"
            )
        self._restores = self._restores + 1 if latest == self._went_back_to else 1
        self._went_back_to = latest
        if self._restores > RESTORES:
            raise TrainingError(f"{text}, after going back to step {latest} {RESTORES} times")
        LOG.warning("%s; training goes back to step %d, and on with the next data", text, latest)
        assert self._folder is not None
        position = self._feed.position()
        self._restore(latest, self._folder.about(latest), self._state.key)
        self._feed.seek(position)

    # Between steps.

    def _evaluate_if_due(self) -> None:
        evaluation = self._evaluation
        if evaluation is None or (self._step != self._steps and self._step % evaluation.every):
            return
        if not self._history or self._history[-1]["step"] != self._step:
            self._evaluate(evaluation)

    def _evaluate(self, evaluation: Evaluation) -> None:
        beat(self._step, "evaluate")
        self._look_back()
        if self._predicted is not self._stage:
            self._predictor = Predictor(self._stage.program, self._mesh, self._stop_between)
            self._predicted = self._stage
        chosen = chosen_state(self._state, best=False)
        program = self._stage.finalize(chosen)
        assert self._predictor is not None
        own = evaluation.run(self._predictor(program.weights))
        # What is kept, and when to stop, must be the same in all processes, whose evaluations may differ.
        metrics: dict[str, float] = json.loads(self._agreement.first(json.dumps(own)))
        self._history.append({"step": self._step, **metrics})
        self._telemetry.record(self._step, metrics, kind="evaluation")
        if evaluation.metric is not None:
            value = metrics[evaluation.metric]
            if evaluation.is_better(value, self._best):
                self._best, self._best_step, self._stale = value, self._step, 0
                best = jax.tree.map(jnp.copy, {**chosen.weights, **chosen.model_state})
                self._state = self._state.replace(best=best)
            else:
                self._stale += 1
        self._mark = (time.perf_counter(), self._step)

    def _save(self) -> None:
        assert self._folder is not None
        self._look_back()
        beat(self._step, "save")
        extra = {
            "data": self._feed.position(), "stage": self._stage.describe(), "best": self._best,
            "best_step": self._best_step, "stale": self._stale, "history": self._history,
        }  # fmt: skip
        self._folder.save(self._step, self._state, extra)
        self._mark = (time.perf_counter(), self._step)

    def _stop_if_asked(self) -> None:
        if not self._preemption.requested(self._step):
            return
        if self._folder is not None:
            self._save()
            self._folder.wait()
        raise Preempted(self._step)

    def _stop_between(self) -> None:
        """During an evaluation, which may be long; several processes must agree, so they wait for the next step."""
        if jax.process_count() == 1:
            self._stop_if_asked()

    @property
    def _keeps_best(self) -> bool:
        return self._evaluation is not None and self._evaluation.metric is not None

    @property
    def _is_stale(self) -> bool:
        patience = None if self._evaluation is None else self._evaluation.patience
        return patience is not None and self._stale >= patience


def chosen_state(state: State, best: bool) -> State:
    """The state with the weights that are evaluated or returned in the place of the last ones."""
    if best:
        pick = lambda tree: {path: state.best[path] for path in tree}  # noqa: E731
        return state.replace(weights=pick(state.weights), model_state=pick(state.model_state))
    return state.replace(weights=state.ema) if state.ema else state
