"""Optuna's study of trained candidates: what to try next, from what all processes tried so far.

Optuna (Akiba et al. 2019) stops no bad trials where there are two objectives, so that is done here: a trial ends half
way if it has lost more than the median of those that are no larger (median rule, Golovin et al. 2017).
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
import pathlib
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lepton_xla.environment.extras import Needs
from lepton_xla.errors import TuningError, first_line
from lepton_xla.tuning.constraints import Constraints, Objective
from lepton_xla.tuning.trials import StoppedError, Trial

type Sampler = Literal["tpe", "random"]
type Settings = dict[str, float]

# Trials whose settings are drawn at random before the sampler learns from them, and those that judge another.
_STARTUP, _JUDGES = 8, 3
# Seconds that a database of SQLite may be locked, and pauses between attempts to open one.
_WAIT_S, _PAUSES_S = 60, (0.1, 0.3, 1.0)
# What each line of Optuna's journal begins with.
_LINE = b'{"op_code":'


def _told[**P, R](method: Callable[P, R]) -> Callable[P, R]:
    """Tell in a line what a storage that is gone or locked raises."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        optuna = imported_optuna()
        try:
            return method(*args, **kwargs)
        except (optuna.exceptions.StorageInternalError, OSError) as error:
            reason = first_line(error.__cause__ or error)
            raise TuningError(f"the storage of trained candidates cannot be used any more: {reason}") from error

    return run


@dataclasses.dataclass
class Asked:
    """Settings to try, and Optuna's trial that they belong to."""

    settings: Settings
    handle: Any


class Study:
    """Optuna's study: what to try next, from what was tried.

    Several processes may work on one study, on several machines too: it holds all that they measured.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, tuple[float, float, bool]],
        first: Sequence[Mapping[str, float]],
        *,
        storage: str | os.PathLike[str] | None = None,
        seed: int = 0,
        sampler: Sampler = "tpe",
    ) -> None:
        """Open a study, or begin one.

        Args:
            name: what its results hold for.
            settings: name -> lowest value, largest value, and whether on a logarithmic scale.
            first: what is tried first.
            storage: a file, or the URL of a database such as `sqlite:///study.db`; None keeps it in memory.
            seed: of what is tried.
            sampler: how to choose.

        Raises:
            TuningError: without Optuna, or if the storage cannot be used.
        """
        self._optuna = imported_optuna()
        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._ranges, self._seed, self._kind = dict(settings), seed, sampler
        self._study: Any = self._optuna.create_study(
            study_name=name,
            storage=None if storage is None else _opened(self._optuna, storage),
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        if not self._study.trials:
            for each in first:
                self._study.enqueue_trial(dict(each), skip_if_exists=True)
        self._take_over()

    @property
    @_told
    def done(self) -> dict[str, Trial]:
        """The trials that have ended, in order, by key."""
        found = (trial.user_attrs for trial in self._study.trials)
        return {each["key"]: Trial.of_json(each["found"]) for each in found if "found" in each}

    @property
    @_told
    def count(self) -> int:
        """How many trials have ended, the same ones among them."""
        return sum("found" in trial.user_attrs for trial in self._study.get_trials(deepcopy=False))

    @_told
    def ask(self) -> Asked:
        """What to try next: nothing that another process tries now."""
        states = self._optuna.trial.TrialState
        while True:
            asked = self._drawn()
            others = self._study.get_trials(deepcopy=False, states=(states.RUNNING, states.COMPLETE, states.PRUNED))
            # Two that ask at once see the same trials, so they draw the same.
            if not any(each.number < asked.handle.number and each.params == asked.settings for each in others):
                return asked
            self._study.tell(asked.handle, state=states.FAIL)

    @_told
    def settings_of(self, trial: Trial) -> Settings | None:
        """The settings that a trial that has ended was asked with; None if it is not of this study."""
        name = trial.name
        for each in self._study.get_trials(deepcopy=False):
            if each.user_attrs.get("found", {}).get("name") == name:
                return {key: float(value) for key, value in each.params.items()}
        return None

    def _drawn(self) -> Asked:
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

    @_told
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
            and "found" in trial.user_attrs
            and trial.user_attrs.get("expected", math.inf) <= expected * (1 + 1e-9)
        ]
        if is_hopeless(drop, others, allowed):
            raise StoppedError(f"stopped half way: {drop:.2f} points lost, the median of smaller ones is less")

    @_told
    def tell(self, asked: Asked, key: str, trial: Trial, values: Sequence[float], excess: float) -> None:
        """Take what became of it."""
        states = self._optuna.trial.TrialState
        asked.handle.set_user_attr("key", key)
        asked.handle.set_user_attr("found", trial.to_json())
        if trial.failure:
            stopped = trial.origin == "stopped"
            self._study.tell(asked.handle, state=states.PRUNED if stopped else states.FAIL)
        else:
            asked.handle.set_constraint("excess", excess)
            self._study.tell(asked.handle, list(values))

    @_told
    def tell_longer(self, settings: Settings, key: str, trial: Trial) -> None:
        """Take what became of settings that were tried before, when they were tried for longer.

        Optuna learns nothing from it: all else was tried for as long as it asked for.
        """
        optuna = self._optuna
        ranges = {
            name: optuna.distributions.FloatDistribution(low, high, log=log)
            for name, (low, high, log) in self._ranges.items()
        }
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.FAIL, params=settings, distributions=ranges,
                user_attrs={"key": key, "found": trial.to_json()},
            )
        )  # fmt: skip

    @_told
    def give_up(self, asked: Asked) -> None:
        """Take that it was not tried to its end; the next that looks tries it first."""
        self._study.tell(asked.handle, state=self._optuna.trial.TrialState.FAIL)
        self._study.enqueue_trial(asked.handle.params)

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
        MissingPackageError: if it is missing; says how to install it.
    """
    with Needs("tune", "training candidates"):
        return importlib.import_module("optuna")


def is_hopeless(drop: float, others: Sequence[float], allowed: float) -> bool:
    """Whether a trial half way is worse than is allowed, and than half of the others.

    >>> is_hopeless(5.0, [1.0, 2.0, 7.0], 0.5), is_hopeless(5.0, [1.0, 2.0], 0.5), is_hopeless(0.4, [0.1] * 3, 0.5)
    (True, False, False)
    """
    return len(others) >= _JUDGES and drop > allowed and drop > statistics.median(others)


def training_key(recipe: str, settings: Mapping[str, float], digest: str) -> str:
    """The name of a trained trial in the journal."""
    text = json.dumps([recipe, sorted(settings.items()), digest])
    return f"trained {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def objectives_of(trial: Trial, objective: Objective, constraints: Constraints) -> tuple[tuple[float, float], float]:
    """What Optuna is told: drop and objective, and by how much constraints are broken.

    Within a bound on the drop a smaller drop is worth nothing: trials beside what is best by the objective teach more.
    """
    excess = trial.excess(constraints)
    if objective == "metric":
        return (trial.judged, float(trial.bytes)), excess
    bound = -math.inf if constraints.max_drop is None else constraints.max_drop
    return (max(trial.judged, bound), float(trial.value(objective))), excess


def _opened(optuna: Any, storage: str | os.PathLike[str]) -> Any:
    """Optuna's storage at a URL or in a file."""
    if "://" in os.fspath(storage):
        return _database(optuna, os.fspath(storage))
    journal: Any = importlib.import_module("optuna.storages.journal")
    try:
        lock: Any = journal.JournalFileSymlinkLock(os.fspath(storage))
        backend: Any = journal.JournalFileBackend(os.fspath(storage), lock)
        lock.acquire()
        try:
            _mend(pathlib.Path(storage))
        finally:
            lock.release()
        list(backend.read_logs(0))
        return optuna.storages.JournalStorage(backend)
    except (OSError, ValueError) as error:
        raise TuningError(f"{os.fspath(storage)}: Optuna's journal cannot be read: {error}") from error


def _mend(path: pathlib.Path) -> None:
    """Cut the line that a killed process was writing, or the next would be written behind it and neither be read."""
    text = path.read_bytes()
    if not text.startswith(_LINE[: len(text)]):
        raise ValueError("it is a file of something else")
    torn = text.rpartition(b"\n")[2]
    if torn and torn.startswith(_LINE[: len(torn)]):
        os.truncate(path, len(text) - len(torn))


def _database(optuna: Any, url: str) -> Any:
    sqlalchemy: Any = importlib.import_module("sqlalchemy")
    shown = f"{url.partition('://')[0]}://..."  # the rest may hold a password
    # Another process may write for long on a busy machine.
    waits = {"connect_args": {"timeout": _WAIT_S}} if url.startswith("sqlite") else None
    try:
        shown = sqlalchemy.make_url(url).render_as_string(hide_password=True)
        for pause in _PAUSES_S:
            try:
                return optuna.storages.RDBStorage(url, engine_kwargs=waits)
            except sqlalchemy.exc.SQLAlchemyError:  # two that begin a database at once make the same tables
                time.sleep(pause)
        return optuna.storages.RDBStorage(url, engine_kwargs=waits)
    except ImportError as error:
        raise TuningError(f"{shown}: the database needs a package that is missing: {error}") from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ValueError) as error:
        raise TuningError(f"{shown}: the database cannot be used: {first_line(error)}") from error


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
