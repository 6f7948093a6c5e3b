"""Candidates that are trained: rounded and pruned while they learn from the float model and from labels.

What each weight becomes is chosen as without training, for an error that training may then make up for. That error,
the rate and the like are chosen by Optuna (Akiba et al. 2019), for a small drop and a small objective at once, from
what all trials so far gave. Optuna stops no bad trials where there are two objectives, so that is done here: a trial
ends half way if it has lost more than the median of those that are no larger (median rule, Golovin et al. 2017).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import socket
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lepton_xla.errors import TuningError
from lepton_xla.modelspec import Predict
from lepton_xla.program import Program
from lepton_xla.recipe import Recipe
from lepton_xla.train import Compression, Evaluation, Labels, Logits, Stage, State, TrainSpec, distill, fit, polynomial
from lepton_xla.train.feeding import Feed
from lepton_xla.train.models import Loss, Model
from lepton_xla.train.steps import make_step
from lepton_xla.trees import abstract, name_leaves, tree_bytes
from lepton_xla.tuning.constraints import Constraints, Objective
from lepton_xla.tuning.digests import digest_of, digest_of_function
from lepton_xla.tuning.judging import Judge
from lepton_xla.tuning.trials import StoppedError, Trial

type Sampler = Literal["tpe", "random"]
type Settings = dict[str, float]

# Trials whose settings are drawn at random before the sampler learns from them, and those that judge another.
_STARTUP, _JUDGES = 8, 3
# Ranges of the settings, and whether they are on a logarithmic scale; shares are of the steps.
RANGES: dict[str, tuple[float, float, bool]] = {
    "rate": (0.02, 2.0, True),
    "steps": (0.25, 1.0, False),
    "quantize_at": (0.0, 0.5, False),
    "prune_until": (0.1, 0.8, False),
    "alpha": (0.0, 1.0, False),
    "temperature": (1.0, 8.0, True),
}
_FIRST = {"rate": 0.3, "steps": 1.0, "quantize_at": 0.25, "prune_until": 0.5, "alpha": 0.5, "temperature": 2.0}
# Options of `fit` that decide the step, and those that candidates train without: they would share files.
_OF_STEP = {"accumulate", "compute_dtype", "clip_norm", "ema"}
_OF_ONE = ("checkpoint", "log", "log_every", "tensorboard", "progress")
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

    def names(self, recipe: Recipe | None = None) -> list[str]:
        """The settings that a recipe's training has; of any recipe without one."""
        left_out = {"prune_until"} if recipe is not None and not recipe.prune else set[str]()
        left_out |= {"quantize_at"} if recipe is not None and not recipe.quantize else set()
        left_out |= {"alpha", "temperature"} if self.spec.loss is not None else set()
        return [name for name in RANGES if name not in left_out]

    def train(self, recipe: Recipe, settings: Mapping[str, float], check: Callable[[float], None]) -> Program:
        """Train a candidate.

        Args:
            recipe: what its weights become.
            settings: by the names of `RANGES`.
            check: called half way with the drop so far, on the rows that candidates are chosen by.

        Returns:
            The trained program, in float: its weights round and prune to what was trained.

        Raises:
            TrainingError: if it cannot be trained.
        """
        spec, model = self.spec, Model.of(self.program)
        steps = max(2, round(spec.steps * settings["steps"]))
        loss = self._loss(settings)
        compression = Compression(
            recipe,
            quantize_from=round(steps * settings["quantize_at"]) if recipe.quantize else None,
            sparsify=(
                polynomial(0, max(1, round(steps * settings["prune_until"])), every=max(1, steps // 50))
                if recipe.prune
                else None
            ),
        )
        half = math.ceil(steps / 2)
        checked = False

        def evaluate(predict: Predict) -> dict[str, float]:
            nonlocal checked
            if not checked:
                checked = True
                check(self.judge.drop(predict))
            return {}

        rated = optax.chain(spec.updates(steps), optax.scale(settings["rate"]))
        result = fit(
            model, loss, rated, spec.data, steps=steps, evaluate=Evaluation(evaluate, every=half),
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


@dataclasses.dataclass
class Asked:
    """Settings to try, and Optuna's trial that they belong to."""

    settings: Settings
    handle: Any


class Study:
    """Optuna's study: what to try next, from what was tried.

    Several processes may work on one study, on several machines if they see the same file.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, tuple[float, float, bool]],
        first: Mapping[str, float],
        *,
        path: str | os.PathLike[str] | None = None,
        seed: int = 0,
        sampler: Sampler = "tpe",
    ) -> None:
        """Open a study, or begin one.

        Args:
            name: what its results hold for.
            settings: name -> lowest value, largest value, and whether on a logarithmic scale.
            first: what is tried first.
            path: its file; None keeps it in memory.
            seed: of what is tried.
            sampler: how to choose.

        Raises:
            TuningError: without Optuna, or if the file cannot be used.
        """
        self._optuna = imported_optuna()
        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._ranges, self._seed, self._kind = dict(settings), seed, sampler
        storage = None
        if path is not None:
            journal: Any = importlib.import_module("optuna.storages.journal")
            storage = self._optuna.storages.JournalStorage(_opened(journal, path))
        self._study: Any = self._optuna.create_study(
            study_name=name, storage=storage, directions=["minimize", "minimize"], load_if_exists=True
        )
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        if not self._study.trials:
            self._study.enqueue_trial(dict(first))
        self._take_over()

    @property
    def done(self) -> list[str]:
        """Keys of the trials that have ended, in order."""
        return [trial.user_attrs["key"] for trial in self._study.trials if "key" in trial.user_attrs]

    def ask(self) -> Asked:
        """What to try next."""
        # The sampler of a trial depends on its number only, so a run that goes on draws what it would have drawn.
        number = self._seed + 1000 * len(self._study.trials)
        samplers = self._optuna.samplers
        self._study.sampler = (
            samplers.RandomSampler(seed=number)
            if self._kind == "random"
            else samplers.TPESampler(
                seed=number, multivariate=True, constant_liar=True, n_startup_trials=_STARTUP
            )
        )  # fmt: skip
        handle = self._study.ask()
        handle.set_user_attr("owner", self._owner)
        settings = {
            name: float(handle.suggest_float(name, low, high, log=log))
            for name, (low, high, log) in self._ranges.items()
        }
        return Asked(settings, handle)

    def check(self, asked: Asked, expected: float, drop: float, allowed: float) -> None:
        """Take the drop half way.

        Raises:
            StoppedError: if it is larger than is allowed, and than the median of trials that are no larger.
        """
        asked.handle.set_user_attr("expected", expected)
        asked.handle.set_user_attr("halfway", drop)
        others: list[float] = [
            trial.user_attrs["halfway"]
            for trial in self._study.trials
            if trial.number != asked.handle.number
            and "key" in trial.user_attrs
            and trial.user_attrs.get("expected", math.inf) <= expected * (1 + 1e-9)
        ]
        if is_hopeless(drop, others, allowed):
            raise StoppedError(f"stopped half way: {drop:.2f} points lost, the median of smaller ones is less")

    def tell(self, asked: Asked, key: str, trial: Trial, values: Sequence[float], excess: float) -> None:
        """Take what became of it."""
        states = self._optuna.trial.TrialState
        asked.handle.set_user_attr("key", key)
        if trial.failure:
            stopped = trial.origin == "stopped"
            self._study.tell(asked.handle, state=states.PRUNED if stopped else states.FAIL)
        else:
            asked.handle.set_constraint("excess", excess)
            self._study.tell(asked.handle, list(values))

    def _take_over(self) -> None:
        """Try again what processes of this machine tried that do not live any more."""
        states = self._optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            host, _, process = trial.user_attrs.get("owner", "").rpartition(":")
            if host == socket.gethostname() and not _lives(int(process)):
                self._study.tell(trial.number, state=states.FAIL)
                if set(trial.params) == set(self._ranges):
                    self._study.enqueue_trial(trial.params)


def imported_optuna() -> Any:
    """Import Optuna.

    Raises:
        TuningError: if it is missing; says how to install it.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise TuningError(f"training candidates needs Optuna: pip install 'lepton-xla[tune]' ({error})") from error


def is_hopeless(drop: float, others: Sequence[float], allowed: float) -> bool:
    """Whether a trial half way is worse than is allowed, and than half of the others.

    >>> is_hopeless(5.0, [1.0, 2.0, 7.0], 0.5), is_hopeless(5.0, [1.0, 2.0], 0.5), is_hopeless(0.4, [0.1] * 3, 0.5)
    (True, False, False)
    """
    return len(others) >= _JUDGES and drop > allowed and drop > statistics.median(others)


def ranges_of(trainer: Trainer, smallest: float, largest: float) -> dict[str, tuple[float, float, bool]]:
    """What is searched: the error to choose for, between two bounds, and the settings of the training."""
    return {"error": (smallest, largest, True), **{name: RANGES[name] for name in trainer.names()}}


def first_of(trainer: Trainer, error: float) -> Settings:
    """What is tried first."""
    return {"error": error, **{name: _FIRST[name] for name in trainer.names()}}


def training_key(recipe: str, settings: Mapping[str, float], digest: str) -> str:
    """The name of a trained trial in the journal."""
    text = json.dumps([recipe, sorted(settings.items()), digest])
    return f"trained {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def objectives_of(trial: Trial, objective: Objective, constraints: Constraints) -> tuple[tuple[float, float], float]:
    """What Optuna is told: drop and objective, and by how much constraints are broken."""
    other = trial.bytes if objective == "metric" else trial.value(objective)
    return (trial.judged, float(other)), trial.excess(constraints)


def _opened(journal: Any, path: str | os.PathLike[str]) -> Any:
    try:
        backend: Any = journal.JournalFileBackend(os.fspath(path))
        list(backend.read_logs(0))
    except (OSError, ValueError) as error:
        raise TuningError(f"{os.fspath(path)}: Optuna's journal cannot be read: {error}") from error
    return backend


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
