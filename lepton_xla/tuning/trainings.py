"""Candidates that are trained: shrunk, rounded and pruned while they learn from the float model and from labels.

What each weight becomes is chosen as without training, for an error that training may then make up for. That error,
the share of channels that goes, the rate and the like are chosen by Optuna, for a small drop and a small objective at
once, from what all trials so far gave (`studies.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lepton_xla.errors import ModelError, TuningError, UnsupportedError
from lepton_xla.modelspec import Predict
from lepton_xla.passes import find_groups
from lepton_xla.program import Program
from lepton_xla.recipe import Recipe
from lepton_xla.train import Compression, Evaluation, Labels, Logits, Stage, State, TrainSpec, distill, fit, polynomial
from lepton_xla.train.feeding import Feed
from lepton_xla.train.models import Loss, Model
from lepton_xla.train.steps import make_step
from lepton_xla.trees import abstract, name_leaves, tree_bytes
from lepton_xla.tuning.digests import digest_of, digest_of_function
from lepton_xla.tuning.judging import Judge
from lepton_xla.tuning.studies import Settings

# Ranges of the settings, and whether they are on a logarithmic scale; shares are of the steps.
RANGES: dict[str, tuple[float, float, bool]] = {
    "rate": (0.02, 2.0, True),
    "steps": (0.25, 1.0, False),
    "quantize_at": (0.0, 0.5, False),
    "prune_until": (0.1, 0.8, False),
    "alpha": (0.0, 1.0, False),
    "temperature": (1.0, 8.0, True),
    "channels": (0.0, 0.7, False),
}
_FIRST = {
    "rate": 0.3, "steps": 1.0, "quantize_at": 0.25, "prune_until": 0.5, "alpha": 0.5, "temperature": 2.0,
    "channels": 0.0,
}  # fmt: skip
# Shares of channels that are tried before Optuna chooses, and the share below which none goes.
_SHARES, _NO_CHANNELS = (0.15, 0.0, 0.4), 0.02
# Options of `fit` that decide the step, and those that candidates train without: they would share files.
_OF_STEP = {"accumulate", "compute_dtype", "clip_norm", "ema"}
_OF_ONE = ("checkpoint", "log", "log_every", "tensorboard", "progress")
# How often a training is looked at on its way.
_LOOKS = 8
# Bytes of batches that a training is told by.
_DIGESTED = 1 << 28


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains candidates from the float model's weights.

    Attributes:
        program: the float program, folded; what is trained.
        spec: data, optimizer, steps, loss and options of a training; its model is not used, nor its checkpoints and
            logs.
        judge: compares with the float model.
        seed: of dropout and the like.
    """

    program: Program
    spec: TrainSpec
    judge: Judge
    seed: int

    @functools.cached_property
    def digest(self) -> str:
        """Digest of what trains: loss, optimizer and options as the step that they make, and the first batches.

        Raises:
            TuningError: if it cannot be trained again for each candidate.
            TrainingError: if the loss or the data cannot be used.
        """
        spec = self.spec
        if isinstance(spec.data, Iterator):
            raise TuningError(
                "training: the data is an iterator, which can be read once, and each candidate reads it again; give a "
                "sequence of batches or a function of the step"
            )
        loss = self._loss(_FIRST)
        prepare, feed, batches, read = getattr(loss, "prepare", dict), Feed(spec.data), list[Any](), 0
        while len(batches) < spec.steps and read < _DIGESTED:
            batches.append(prepare(feed.next()))
            read += tree_bytes(batches[-1])
        stage = Stage.begin(Compression(), Model.of(self.program), loss, spec.updates(spec.steps))
        given = self._options()
        options = {name: given.pop(name) for name in _OF_STEP & given.keys()}
        state = jax.eval_shape(
            lambda weights: State.first(
                weights, stage.model.state, stage.optimizer.init(weights), jax.random.key(0)
            ).replace(ema=weights if options.get("ema") else {}),
            dict(stage.weights),
        )
        arrays = getattr(loss, "arrays", None)
        step = make_step(stage.loss, stage.optimizer, **options)
        batch = jax.eval_shape(lambda: {name: jnp.asarray(each) for name, each in batches[0].items()})
        steps = digest_of_function(step, state, batch, abstract(arrays))
        teachers = name_leaves(arrays, single="arrays") if arrays is not None else {}
        return digest_of([teachers, *batches], before=f"{spec.steps} {steps} {sorted(given.items())!r}")[:16]

    @functools.cached_property
    def shrinks(self) -> bool:
        """Whether channels, hidden units or heads can be removed."""
        try:
            return bool(find_groups(self.program).removable)
        except (ModelError, UnsupportedError):
            return False

    def names(self, recipe: Recipe | None = None) -> list[str]:
        """The settings that a recipe's training has; of any recipe without one."""
        left_out = {"prune_until"} if recipe is not None and not recipe.prune else set[str]()
        left_out |= {"quantize_at"} if recipe is not None and not recipe.quantize else set()
        left_out |= {"alpha", "temperature"} if self.spec.loss is not None else set()
        left_out |= set() if self.shrinks else {"channels"}
        return [name for name in RANGES if name not in left_out]

    def train(
        self,
        recipe: Recipe,
        settings: Mapping[str, float],
        check: Callable[[float], None],
        at: Callable[[float], None] | None = None,
    ) -> Program:
        """Train a candidate.

        Args:
            recipe: what its weights become.
            settings: by the names of `RANGES`.
            check: called half way with the drop so far, on the rows that candidates are chosen by.
            at: called with the share of the steps that are done, some times on the way.

        Returns:
            The trained program, in float: its weights round and prune to what was trained.

        Raises:
            TrainingError: if it cannot be trained.
        """
        spec, model = self.spec, Model.of(self.program)
        steps = max(2, round(spec.steps * settings["steps"]))
        loss = self._loss(settings)
        channels = settings.get("channels", 0.0)
        shrinks = channels >= _NO_CHANNELS
        compression = Compression(
            recipe,
            quantize_from=round(steps * settings["quantize_at"]) if recipe.quantize else None,
            sparsify=(
                polynomial(0, max(1, round(steps * settings["prune_until"])), every=max(1, steps // 50))
                if recipe.prune
                else None
            ),
            shrink_at=1 if shrinks else None,
            shrink={"sparsity": channels, "importance": "taylor", "on_unsupported": "keep"} if shrinks else None,
        )
        every = math.ceil(steps / _LOOKS)
        looks = 0

        def evaluate(predict: Predict) -> dict[str, float]:
            nonlocal looks
            looks += 1
            if at is not None:
                at(min(1.0, looks * every / steps))
            if (looks - 1) * every < steps / 2 <= looks * every:
                check(self.judge.drop(predict))
            return {}

        rated = optax.chain(spec.updates(steps), optax.scale(settings["rate"]))
        result = fit(
            model, loss, rated, spec.data, steps=steps, evaluate=Evaluation(evaluate, every=every),
            compression=compression, progress=False, **self._options(),
        )  # fmt: skip
        return result.program

    def _options(self) -> dict[str, Any]:
        """The options of each candidate's training; it has no checkpoint to go back to."""
        given = {"seed": self.seed} | {name: each for name, each in self.spec.options.items() if name not in _OF_ONE}
        return {**given, "on_nan": "stop"} if given.get("on_nan") == "restore" else given

    def _loss(self, settings: Mapping[str, float]) -> Loss:
        """The loss of the training; without one, from the float model's logits and from labels."""
        if self.spec.loss is not None:
            return self.spec.loss
        terms = [Logits(settings["temperature"], weight=settings["alpha"]), Labels(weight=1 - settings["alpha"])]
        return distill(Model.of(self.program), self.program, [term for term in terms if term.weight])


def ranges_of(trainer: Trainer) -> dict[str, tuple[float, float, bool]]:
    """What is searched: the error to choose for, as a share of the way (logarithmic) between the smallest and the
    largest, and the settings of the training."""
    return {"error": (0.0, 1.0, False), **{name: RANGES[name] for name in trainer.names()}}


def first_of(trainer: Trainer, error: float) -> list[Settings]:
    """What is tried first, with this error: a few channels go, then none, then more."""
    first = {"error": error, **{name: _FIRST[name] for name in trainer.names()}}
    return [{**first, "channels": share} for share in _SHARES] if trainer.shrinks else [first]
