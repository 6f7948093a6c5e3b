"""Stages of a compressed training run: between two changes, the loss and the optimizer stay the same functions."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lepton_xla.arguments import takes
from lepton_xla.errors import TrainingError
from lepton_xla.passes.core.calibration import calibrate, needs_range
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization.fake_quantization import initial_scales
from lepton_xla.passes.quantization.integer_arithmetic import quantize
from lepton_xla.passes.shrinking.groups import find_groups
from lepton_xla.passes.shrinking.resizing import on_smaller_weights
from lepton_xla.program import Program
from lepton_xla.train.compression.compressions import Change, Compression
from lepton_xla.train.compression.cutting import cut_by_path, cut_scales, cut_state, readable
from lepton_xla.train.compression.decisions import Decisions, agreed
from lepton_xla.train.compression.losses import Changes, StageLoss, smaller_apply
from lepton_xla.train.compression.removal import decide_cuts
from lepton_xla.train.models import Loss, Model
from lepton_xla.train.sparsity import finalize, sparsify, state_of
from lepton_xla.train.state import State
from lepton_xla.trees import abstract

# The scales' learning rate: a scale changes by 0.07 % a step, as they are logarithms to base 2.
_SCALE_RATE = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A model in training between two changes of a compression schedule.

    A stage is a function of the original model and of what was decided so far: it holds no array of a run.

    Attributes:
        compression: the schedule.
        whole: the original model.
        criterion: the user's loss.
        updates: the user's optimizer.
        decided: what was decided so far.

    >>> import optax
    >>> weights = {"up": jnp.array([[3.0, 1.0], [1.0, 1.0]]), "down": jnp.ones((2, 2))}
    >>> inputs = {"x": lx.TensorSpec(("batch", 2), "float32")}
    >>> program = lx.trace(lambda w, x: jax.nn.relu(x @ w["up"]) @ w["down"], weights, inputs)
    >>> compression = lx.train.Compression("int8", shrink_at=1, shrink={"sparsity": 0.5}, quantize_from=2)
    >>> begun = (compression, program, lx.train.supervised(program), optax.adam(0.1))
    >>> stage = lx.train.Stage.begin(*begun)
    >>> state = lx.train.State.first(stage.weights, stage.model.state, stage.optimizer.init(weights), jax.random.key(0))
    >>> stage.due(0), stage.due(1)
    (False, True)

    Before a step for which it is due:

    >>> batch = {"x": jnp.eye(2), "label": jnp.array([0, 1])}
    >>> stage, state = stage.advance(state.replace(step=jnp.int32(1)), batch)
    >>> state.weights["up"].tolist(), state.optimizer[0].mu["down"].shape, stage.program.outputs == program.outputs
    ([[3.0], [1.0]], (1, 2), True)
    >>> stage, state = stage.advance(state.replace(step=jnp.int32(2)), batch)
    >>> loss, metrics, _ = stage.loss(state.weights, batch, state.key, state.model_state)
    >>> stage.plan["up"].describe(), stage.scales
    ('int8 weights, int8 activations dynamic', {})

    To go on in another process, and at the end:

    >>> len(jax.tree.leaves(stage.essential(state).optimizer))
    0
    >>> again = lx.train.Stage.resume(*begun, stage.describe())
    >>> again.weights["up"].shape, stage.finalize(state).weights_bytes, stage.quantized(state).weights["up"].format
    ((2, 1), 16, 'int8')
    """

    compression: Compression
    whole: Model
    criterion: Loss
    updates: optax.GradientTransformation
    decided: Decisions = dataclasses.field(default_factory=Decisions)

    @staticmethod
    @takes(compression=Compression, loss=Callable)
    def begin(
        compression: Compression, model: Model | Program, loss: Loss, optimizer: optax.GradientTransformation
    ) -> Stage:
        """Make the first stage; what does not fit the model is refused here, before any step.

        Raises:
            RecipeError: if a rule or pattern does not fit the program.
            UnsupportedError: if a site cannot be handled, or scales of its format cannot be trained.
            ModelError: if the model cannot be trained.
        """
        stage = Stage(compression, Model.of(model), loss, optimizer)
        passed = tuple(change.name for change in compression.changes if change.name != "shrink")
        final = stage._deciding(passed=passed)
        if compression.shrink_at is not None:
            find_groups(stage.program).protecting(_patterns(compression))
        plan = final.plan
        if plan is not None and compression.learn_scales:
            jax.eval_shape(lambda: initial_scales(stage.program.weights, plan))
        jax.eval_shape(stage.optimizer.init, abstract(stage.weights))
        return stage

    @staticmethod
    @takes(compression=Compression, loss=Callable, described=Mapping)
    def resume(
        compression: Compression,
        model: Model | Program,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        described: Mapping[str, Any],
    ) -> Stage:
        """Make the stage that `describe` described, from the original model.

        Raises:
            CheckpointError: if the description is of another model, or none.
        """
        stage = Stage(compression, Model.of(model), loss, optimizer)
        return dataclasses.replace(stage, decided=Decisions.from_json(described, stage._whole_shapes))

    def describe(self) -> dict[str, Any]:
        """What was decided, as plain dicts, lists, numbers and texts: what `resume` needs beside the model."""
        return self.decided.to_json()

    # What a training step is made of.

    @functools.cached_property
    def loss(self) -> StageLoss:
        """`loss(weights, batch, key, state, *, scales=None)`: the user's loss on this stage's weights."""
        rounded = dataclasses.replace(self._cut, plan=self.plan, ranges=self.decided.ranges)
        return StageLoss(self.criterion, rounded)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The user's optimizer; it prunes if the schedule does."""
        if self.compression.sparsify is None:
            return self.updates
        plan = resolve(self.compression.rules.replace(quantize=()), self.program)
        return sparsify(self.updates, plan, schedule=self.compression.sparsify, regrow=self.compression.regrow)

    @property
    def scale_optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the trained scales.

        >>> import optax
        >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("n", 4), "float32")})
        >>> compression = lx.train.Compression("int8", quantize_from=0, learn_scales=True)
        >>> stage = lx.train.Stage.begin(compression, program, lx.train.supervised(program), optax.sgd(0.1))
        >>> int(stage.scale_optimizer.init({"w": jnp.ones(1)})[0].count)
        0
        """
        return self.compression.scale_optimizer or optax.adam(_SCALE_RATE)

    @functools.cached_property
    def model(self) -> Model:
        """The model of this stage. Its arrays are the original ones without what was removed, not trained ones."""
        whole, decided = self.whole, self.decided
        if not decided.cuts:
            return whole
        fn = on_smaller_weights(
            whole.program.fn, abstract(whole.program.weights), self._program_cuts, list(whole.program.inputs)
        )
        weights = cut_by_path(whole.program.weights, decided.cuts)
        history = (*whole.program.history, *([decided.report] if decided.report is not None else []))
        masks = cut_by_path(whole.program.masks, decided.cuts)
        program = whole.program.replace(fn=fn, weights=weights, masks=masks, history=history)
        return Model(
            smaller_apply(whole.apply, self._cut),
            {path: weights[path] for path in whole.weights},
            {path: weights[path] for path in whole.state},
            program,
        )

    @property
    def program(self) -> Program:
        """The program of this stage, for evaluation: `program.fn({**state.weights, **state.model_state}, *inputs)`."""
        return self.model.program

    @property
    def weights(self) -> dict[str, jax.Array]:
        """Weights to begin with, those of the loss included."""
        return {**self.model.weights, **getattr(self.loss, "extra_weights", {})}

    @functools.cached_property
    def plan(self) -> Plan | None:
        """What is rounded in this stage; None for nothing."""
        if "quantize" not in self.decided.passed:
            return None
        recipe = self.compression.rules.replace(prune=())
        plan = resolve(recipe, self.program)
        if "freeze" in self.decided.passed or not any(map(needs_range, recipe.quantize)):
            return plan
        dynamic = recipe.replace({f"quantize.{index}.dynamic": True for index in range(len(recipe.quantize))})
        return resolve(dynamic, self.program, sites=[entry.site for entry in plan.sites])

    @property
    def scales(self) -> dict[str, Any]:
        """Trained scales to begin with (`values`) and the state of their optimizer; empty if none are trained."""
        return self._first_scales(self.program.weights)

    # How a stage ends.

    def due(self, step: int) -> bool:
        """Whether the stage changes before the step of this number, counted from 0."""
        return any(change.step <= step for change in self._changes_left)

    def advance(self, state: State, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[Stage, State]:
        """Make the changes that are due before the next step.

        Args:
            state: the state of the run; its arrays are not changed.
            batch: a batch, or several, on which ranges are measured and units are ranked, if that needs data; as the
                loss gets them, but on the host.

        Returns:
            The next stage, and the state cut alike. Where nothing was cut, arrays are the same.

        Raises:
            RecipeError: if the target of shrinking cannot be reached, or a rule does not fit the smaller model.
            CalibrationError: if the batch cannot be used.
            TrainingError: if the optimizer cannot go on with the smaller weights.
        """
        batches = [batch] if isinstance(batch, Mapping) else list(batch)
        stage = self
        for change in self._changes_left:
            if change.step > int(state.step):
                continue
            if change.name == "shrink":
                stage, state = stage._shrunk(state, batches)
                continue
            ranges = stage._measured(state, batches) if change.name == "freeze" else stage.decided.ranges
            passed = (*stage.decided.passed, change.name)
            stage = stage._deciding(passed=passed, ranges=ranges)._agreed()
        if stage._trains_scales and not state.scales:
            state = state.replace(scales=stage._first_scales(readable(stage._together(state))))
        return stage, state

    def finalize(self, state: State) -> Program:
        """Return the trained program, with exact zeros and masks where it was pruned.

        `quantized` stores it, bit for bit as training computed with it; so does `lx.passes.quantize` with `plan`, the
        ranges and the trained scales.
        """
        weights, masks = state.weights, dict(self.program.masks)
        if self.compression.sparsify is not None:
            weights, masks = finalize(weights, state.optimizer)
        return self.program.replace(weights=self._together(state.replace(weights=weights)), masks=masks)

    def essential(self, state: State) -> State:
        """Return the part of a state that `finalize` and `quantized` read; moments and averages are left out."""
        pruned = self.compression.sparsify is not None
        return state.replace(optimizer=state_of(state.optimizer)._replace(inner=()) if pruned else (), ema={}, best={})

    def quantized(self, state: State, **options: Any) -> Program:
        """Return the trained program with the weights as codes; `options` are those of `lx.passes.quantize`.

        Raises:
            TrainingError: if this stage rounds nothing.
        """
        if self.plan is None:
            raise TrainingError("nothing was trained with rounding so far; quantize the program of finalize instead")
        return quantize(self.finalize(state), self.plan, self._ranges, scales=state.scales.get("values"), **options)

    # Parts.

    @functools.cached_property
    def _whole_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        extra = getattr(self.criterion, "extra_weights", {})
        return abstract({**self.whole.program.weights, **extra})

    @functools.cached_property
    def _cut(self) -> Changes:
        return Changes(self._whole_shapes, frozenset(self.whole.state), self.decided.cuts)

    @property
    def _changes_left(self) -> list[Change]:
        return [change for change in self.compression.changes if change.name not in self.decided.passed]

    @property
    def _program_cuts(self) -> dict[str, Any]:
        return {path: cut for path, cut in self.decided.cuts.items() if path in self.whole.program.weights}

    @property
    def _ranges(self) -> dict[str, jax.Array]:
        return {name: jnp.asarray(value) for name, value in self.decided.ranges.items()}

    @property
    def _trains_scales(self) -> bool:
        names = {change.name for change in self.compression.changes} - {"shrink"}
        return self.compression.learn_scales and names <= set(self.decided.passed)

    def _first_scales(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        if not self._trains_scales:
            return {}
        assert self.plan is not None
        values = initial_scales(dict(weights), self.plan, self._ranges)
        return {"values": values, "optimizer": self.scale_optimizer.init(values)}

    def _agreed(self) -> Stage:
        return dataclasses.replace(self, decided=agreed(self.decided, self._whole_shapes))

    def _deciding(self, **changes: Any) -> Stage:
        return dataclasses.replace(self, decided=dataclasses.replace(self.decided, **changes))

    def _together(self, state: State) -> dict[str, Any]:
        """The program's weights in a state, in its order."""
        every = {**state.weights, **state.model_state}
        return {path: every[path] for path in self.program.weights}

    def _readable_program(self, state: State) -> Program:
        return self.program.replace(weights=readable(self._together(state)), masks={})

    def _measured(self, state: State, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        recipe = self.compression.rules.replace(prune=())
        program = self._readable_program(state)
        return jax.device_get(calibrate(program, resolve(recipe, program), self._inputs(batches)))

    def _inputs(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{name: batch[name] for name in self.program.inputs if name in batch} for batch in batches]

    def _shrunk(self, state: State, batches: Sequence[Mapping[str, Any]]) -> tuple[Stage, State]:
        """Remove units from the model, the loss and the state."""
        start = time.perf_counter()
        program = self._readable_program(state)
        cuts, report = decide_cuts(
            program, self.criterion, self._cut, self.compression.shrink_options, batches, state.key
        )
        stage = self._deciding(passed=(*self.decided.passed, "shrink"), cuts=cuts, report=report)._agreed()
        cuts = stage.decided.cuts
        small, anew = cut_state(state, stage.optimizer, cuts)
        if state.scales:
            assert self.plan is not None
            fresh = stage._first_scales(readable(stage._together(small)))
            shapes = abstract(program.weights)
            scales, more = cut_scales(state.scales, fresh, self.plan, shapes, cuts)
            small, anew = small.replace(scales=scales), [*anew, *more]
        metrics = {**report.metrics, "state_anew": anew} if anew else report.metrics
        report = dataclasses.replace(report, seconds=time.perf_counter() - start, metrics=metrics)
        return stage._deciding(report=report), small


def _patterns(compression: Compression) -> list[str]:
    patterns = compression.shrink_options.get("protect", ())
    return [patterns] if isinstance(patterns, str) else list(patterns)
