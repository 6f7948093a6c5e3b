"""The learner: one round after another from samples to a promoted version, each of which may be killed anywhere."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from time import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from lepton_xla.compiler import Servable, load, make_update, master_weights, sign
from lepton_xla.dtypes import is_floating
from lepton_xla.errors import CheckpointError, LearningError, LeptonError, SampleError, TrainingError, first_line
from lepton_xla.generation.rows import PROMPT, REPLY
from lepton_xla.learning.judging import judge, judge_replies, text_of
from lepton_xla.learning.labelled import LENGTHS, Labelled, read_labelled, read_replies
from lepton_xla.learning.lowering import lower
from lepton_xla.learning.masters import read_master, write_master
from lepton_xla.learning.mixing import Mixture, OldData
from lepton_xla.learning.plans import LearningPlan
from lepton_xla.learning.pushing import Push
from lepton_xla.learning.rounds import Round, Rounds
from lepton_xla.learning.tracking import Window, accuracy_over_time
from lepton_xla.samples import Sample, Samples
from lepton_xla.serve.client import RequestError
from lepton_xla.serve.monitor.monitor import judged_output
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.train.checkpoints import Checkpoints
from lepton_xla.train.evaluations import Evaluation
from lepton_xla.train.loop import fit
from lepton_xla.train.models import Model, supervised
from lepton_xla.train.specs import TrainSpec
from lepton_xla.trust.keys import signing_key

_log = logging.getLogger(__name__)

_CHECKPOINTS = 4
# Batches to calibrate with.
_CALIBRATION = 4
# Statuses of a version that the server will never take: the next round makes another.
_FINAL = (400, 422)


class Learner:
    """Learns from the samples of a model while it is served.

    Args:
        spec: how the model is trained; its data is the old data.
        base: the artifact that is served, or was first: its compiled code is used, and its recipe. If it keeps its
            float master, the first round begins with that, otherwise with the weights of the spec.
        samples: folder of samples.
        folder: where the learner keeps its own files.
        push: the server's model; None keeps the result as an artifact.
        plan: numbers and shares.
        trained: folder of checkpoints of the training run of the spec; the first round begins with its weights.
        key: file of the private key that signs what is learned, for servers that load only signed artifacts.
        tell: called with a line when a step begins.

    Raises:
        LearningError: if the model has no output with classes.
        ArtifactError: if the artifact cannot be loaded.
        TrustError: if the key cannot be used.

    >>> import optax
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> _ = lx.compile(program, {"batch": (1, 8)}, name="tiny").save("tiny.lepton")
    >>> batch = {"x": np.eye(2, dtype=np.float32), "label": np.array([0, 1])}
    >>> spec = lx.train.TrainSpec(program, [batch], steps=20, optimizer=optax.sgd(0.5))
    >>> learner = Learner(spec, "tiny.lepton", samples="kept", folder="learning")
    >>> try:
    ...     ended = learner.once("better.lepton")
    ... except lx.SampleError:
    ...     print("nobody has sent requests yet")
    nobody has sent requests yet
    >>> learner.history(), learner.tracked(), learner.folder.name
    ([], [], 'tiny')
    """

    def __init__(
        self,
        spec: TrainSpec,
        base: str | os.PathLike[str],
        samples: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        *,
        push: Push | None = None,
        plan: LearningPlan | None = None,
        trained: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        tell: Callable[[str], object] = lambda line: None,
    ) -> None:
        self._spec = spec
        self._plan = plan or LearningPlan()
        self._push = push
        self._tell = tell
        self._trained = trained
        self._key = key
        if key is not None:
            signing_key(key)  # so that a wrong one shows before anything is trained
        self._samples = samples
        tell("load the artifact")
        self._path = base
        self._base = load(base)
        self.model = self._base.name if push is None else push.model
        self._generates = self._base.stepper is not None
        output = None if self._generates else judged_output(signature_of(self._base))
        if self._generates:
            _check_generator(spec)
        elif output is None:
            raise LearningError(
                f"{os.fsdecode(base)} has no output with classes (one of floats, [batch, classes]), which feedback "
                "could be compared with"
            )
        self._output = "" if output is None else list(self._base.outputs)[output]
        self._rounds = Rounds(folder, self.model)
        self._old: OldData | None = None
        self._start: Model | None = None

    @property
    def folder(self) -> pathlib.Path:
        """Where the files of this model are."""
        return self._rounds.folder

    def history(self) -> list[Round]:
        """The rounds that ended."""
        return self._rounds.history()

    def tracked(self, windows: int = 24) -> list[Window]:
        """Accuracy of what was answered, over the time of the samples. See `accuracy_over_time`."""
        try:
            kept = Samples(self._samples, self.model).with_labels(self._plan.most_rows)
            return accuracy_over_time(kept, self._is_right if self._generates else self._output, windows)
        except SampleError:
            return []

    def _is_right(self, sample: Sample) -> bool | None:
        reply = sample.outputs.get(REPLY)
        if sample.reply is None or reply is None or REPLY in sample.hashed:
            return None
        return text_of(self._base, reply[0].tolist()) == sample.reply

    def once(self, output: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> Round:
        """Go on with the round that was interrupted, or make one, to its end.

        Args:
            output: where to save what is better, if there is no server to push it to; None saves it nowhere.
            overwrite: whether an artifact that is there is replaced.

        Returns:
            The round. Its phase says how it ended: `promoted`, `rolled back`, `stopped`, `refused` (not better), or
            `kept`, where there is no server.

        Raises:
            SampleError: if there are no samples.
            LearningError: if there are too few, they do not fit, or the server does not load the result.
            RequestError: if the server cannot be reached, or refuses. The next call goes on.
            TrainingError: if training fails; the round is forgotten.
            ArtifactError: if the result cannot be saved. The next call goes on.
        """
        with self._rounds.locked() as rounds:
            current = rounds.current
            if current is None:
                self._follow_server(rounds)
                current = self._begin(rounds)
            else:
                _log.info("round %d goes on: %s", current.number, current.phase)
            if current.phase == "train":
                current = self._train(rounds, current)
            if current.phase == "judge":
                current = self._judge(rounds, current, output, overwrite)
            if current.phase == "push":
                current = self._send(rounds, current)
            if current.phase == "rollout":
                current = self._roll_out(rounds, current)
            return current

    def _follow_server(self, rounds: Rounds) -> None:
        """Forget the learner's weights if the server has gone on to another version than its last one."""
        if self._push is None:
            return
        self._tell("ask the server")
        stable, mine = self._push.stable(), rounds.serving_version
        if mine and stable != mine:
            _log.warning(
                "version %s of %s is stable, not %s, which was learned last: beginning with the model's own weights",
                stable, self.model, mine,
            )  # fmt: skip
            rounds.forget()

    # The steps of a round.

    def _begin(self, rounds: Rounds) -> Round:
        self._tell("read samples")
        train, judges, kept, notes = self._split()
        before = [each for each in rounds.history() if each.rows]
        new = len(train) if not before else self._count_since(kept, before[-1].newest_s)
        least = self._plan.least_rows
        if new < least:
            raise LearningError(
                f"{new} labelled rows are new since round {before[-1].number}; expected {least}{_left_out(train)}"
            )
        return rounds.save(
            Round(
                number=rounds.next_number, began_s=time(), rows=len(train), held_out=len(judges),
                newest_s=kept[-1].time_s,
                notes=notes,
            )
        )  # fmt: skip

    def _split(self) -> tuple[Labelled, Labelled, list[Sample], tuple[str, ...]]:
        """Rows to train on and to judge by, their samples, and notes.

        Looked at in each step: those of a round that was interrupted for long may be gone meanwhile.
        """
        rows, kept, notes = self._read()
        train, judges = rows.split(self._plan.held_out)
        least, least_held_out = self._plan.least_rows, self._plan.least_held_out
        if len(train) < least or len(judges) < least_held_out:
            raise LearningError(
                f"{len(train)} labelled rows to train on and {len(judges)} to judge by are too few; expected {least} "
                f"and {least_held_out}{_left_out(rows)}"
            )
        return train, judges, kept, notes

    def _read(self) -> tuple[Labelled, list[Sample], tuple[str, ...]]:
        found = Samples(self._samples, self.model)
        notes: list[str] = []
        if found.damaged_bytes:
            notes.append(f"{found.damaged_bytes} bytes of damaged sample files were passed over")
            _log.warning("%s", notes[-1])
        kept = list(found.with_labels(self._plan.most_rows))
        if not kept:
            raise SampleError(
                f"{os.fsdecode(self._samples)}: {found.count} samples of {self.model!r}, none with feedback: send the "
                "right answers to /v2/models/NAME/feedback"
            )
        rows, numberless = self._usable(kept, self._plan.most_rows)
        if numberless:
            notes.append(f"{numberless} rows with NaN or infinity were left out: the old data has none")
            _log.warning("%s", notes[-1])
        if rows.foreign:
            notes.append(f"{rows.foreign} samples do not fit: {rows.why}")
            _log.warning("%s", notes[-1])
        if self._generates:
            return rows, kept, tuple(notes)
        classes = self._base.outputs[self._output].shape[1]
        wrong = rows.labels[(rows.labels < 0) | (rows.labels >= classes)]
        if len(wrong):
            raise LearningError(f"a label is {wrong[0]}, and the model has the classes 0 to {int(classes) - 1}")
        return rows, kept, tuple(notes)

    def _count_since(self, kept: Iterable[Sample], time_s: float) -> int:
        """Rows to train on of requests that came after a time."""
        new = [each for each in kept if each.time_s > time_s]
        return len(self._usable(new)[0].split(self._plan.held_out)[0])

    def _usable(self, kept: Iterable[Sample], most_rows: int | None = None) -> tuple[Labelled, int]:
        """Rows that a round can learn from, and how many were left out.

        A single row with NaN would make every loss NaN, and anybody can send one. Where the old data has such values
        too, they are part of what the model takes.
        """
        if self._generates:
            longest = self._base.generator.steps.longest_prompt
            return read_replies(kept, longest, most_rows, self._rounds.secret()), 0
        rows = read_labelled(kept, self._base.inputs, most_rows, self._rounds.secret())
        well = np.ones(len(rows), bool)
        for name, array in rows.inputs.items():
            finite = _finite_rows(array)
            if not finite.all() and _finite_rows(self._old_data().rows[name]).all():
                well &= finite
        left_out = int((~well).sum())
        return (rows.only(well) if left_out else rows), left_out

    def _train(self, rounds: Rounds, current: Round) -> Round:
        self._tell("train")
        train, *_ = self._split()
        old, steps = self._old_data(), self._plan.steps or self._spec.steps
        model = self._model(rounds)
        mixture = Mixture(old, self._examples(old, train), self._plan.fresh, self._plan.seed + current.number)
        options: dict[str, Any] = {"progress": False, "seed": current.number, **self._spec.options}
        checkpoint = Checkpoints(rounds.work / "checkpoints", every=max(1, steps // _CHECKPOINTS), keep=1)
        try:
            result = fit(
                model, self._spec.loss or supervised(model, label=old.label), self._spec.updates(steps), mixture,
                steps=steps, checkpoint=checkpoint, **options,
            )  # fmt: skip
        except (TrainingError, CheckpointError):
            rounds.drop()  # the next round begins anew
            raise
        self._tell("lower")
        version = str(current.number)
        batches = [
            {name: mixture(step)[name] for name in self._base.inputs}
            for step in range(0 if self._generates else _CALIBRATION)
        ]
        update = lower(result.program, self._path, self._base, batches, version)
        update.save(rounds.work / "update.lepton", overwrite=True)
        if self._key is not None:
            sign(rounds.work / "update.lepton", key=self._key)
        write_master(rounds.work / "master.npz", result.program.weights)
        return rounds.change(current, phase="judge")

    def _old_data(self) -> OldData:
        if self._old is None:
            inputs = None if self._generates else list(self._base.inputs)
            self._old = OldData(self._spec.data, inputs, self._plan.old_rows)
        return self._old

    def _examples(self, old: OldData, rows: Labelled) -> Mapping[str, np.ndarray]:
        """Samples as rows of a batch."""
        if not self._generates:
            return {**rows.inputs, old.label: rows.labels}
        assert self._spec.examples is not None
        return _by_user("examples", self._spec.examples, _prompts(rows), rows.labels.tolist())

    def _model(self, rounds: Rounds) -> Model:
        """The model with the weights that training goes on from."""
        if self._start is None:
            self._start = self._first_model()
        model = self._start
        if not rounds.master.exists():
            return model
        master = read_master(rounds.master)
        shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in model.program.weights.items()}
        if {path: (leaf.shape, leaf.dtype) for path, leaf in master.items()} != shapes:
            raise LearningError(
                f"{rounds.master} has the weights of another model than {self.model!r}: remove {rounds.folder}"
            )
        return _with_weights(model, master)

    def _first_model(self) -> Model:
        model = self._spec.trained()
        if self._trained is None:
            return self._of_master(model)
        steps = self._spec.steps
        options: dict[str, Any] = {"progress": False, **self._spec.options}
        result = fit(
            model, self._spec.loss or supervised(model, label=self._old_data().label), self._spec.updates(steps),
            self._spec.data, steps=steps, checkpoint=Checkpoints(self._trained),
            compression=self._spec.compression, evaluate=self._spec.evaluation(steps),
            **options,
        )  # fmt: skip
        return _with_weights(model, result.program.weights)

    def _of_master(self, model: Model) -> Model:
        """The model with the float weights that the artifact keeps, if it keeps some."""
        if self._base.manifest.master is None:
            return model
        master, own = master_weights(self._path), model.program.weights
        for path, leaf in master.items():
            if path not in own or (own[path].shape, own[path].dtype) != (leaf.shape, leaf.dtype):
                raise LearningError(
                    f"{os.fsdecode(self._path)} was compiled from another model than the TrainSpec's: it has the "
                    f"weight {path!r}, {leaf.dtype}{list(leaf.shape)}"
                )
        # Weights that nothing reads are not kept.
        return _with_weights(model, {**own, **master})

    def _judge(self, rounds: Rounds, current: Round, output: str | os.PathLike[str] | None, overwrite: bool) -> Round:
        self._tell("judge")
        _, judges, *_ = self._split()
        before: Servable = load(rounds.serving, base=self._base) if rounds.serving.exists() else self._base
        after = load(rounds.work / "update.lepton", base=self._base)
        given, old = self._spec.evaluate, self._old_data()
        evaluate = given.evaluate if isinstance(given, Evaluation) else given

        def on_old_data(predict: Any) -> Mapping[str, float]:
            if evaluate is None:
                return {"accuracy": old.accuracy(predict, self._output)}
            return _by_user("evaluate", evaluate, predict)

        lower, higher = set(self._plan.lower_is_better), set[str]()
        if isinstance(given, Evaluation) and given.metric is not None:
            (lower if given.mode == "min" else higher).add(given.metric)
        limits: dict[str, Any] = {
            "max_drop": self._plan.max_drop, "confidence": self._plan.confidence,
            "lower_is_better": lower, "higher_is_better": higher,
        }  # fmt: skip
        if self._generates:
            verdict = judge_replies(before, after, _prompts(judges), judges.labels.tolist(), on_old_data, **limits)
        else:
            verdict = judge(before, after, judges.inputs, judges.labels, self._output, on_old_data, **limits)
        current = rounds.change(current, verdict=dataclasses.asdict(verdict), held_out=len(judges))
        if not verdict.better:
            return rounds.end(current, "refused", verdict.reason)
        if self._push is None:
            if output is not None:  # before the round ends, so that a kill does not lose it
                make_update(self._base, rounds.work / "update.lepton").save(output, overwrite=overwrite)
                if self._key is not None:
                    sign(output, key=self._key)
            return rounds.end(current, "kept", verdict.reason)
        return rounds.change(current, phase="push", version=self._free_version(rounds))

    def _free_version(self, rounds: Rounds) -> str:
        assert self._push is not None
        return self._push.free_version(each.version for each in rounds.history() if each.version)

    def _send(self, rounds: Rounds, current: Round) -> Round:
        assert self._push is not None
        self._tell("push")
        self._push.stable()
        try:
            while not self._push.push(rounds.work / "update.lepton", current.version):
                current = rounds.change(current, version=self._free_version(rounds))
        except RequestError as error:
            if error.status not in _FINAL:
                raise
            return rounds.end(current, "stopped", f"the server refuses version {current.version}: {error.message}")
        return rounds.change(current, phase="rollout")

    def _roll_out(self, rounds: Rounds, current: Round) -> Round:
        assert self._push is not None
        self._tell(f"roll version {current.version} out")
        try:
            self._push.wait_loaded(current.version)
        except LearningError as error:
            return rounds.end(current, "stopped", str(error))
        if self._plan.direct:
            self._push.promote(current.version)
            return rounds.end(current, "promoted", f"promoted at once: {current.verdict['reason']}")

        def tell(rollout: Mapping[str, Any]) -> None:
            self._tell(f"roll version {current.version} out: {rollout['state']} {rollout['share']:.0%}")

        rollout = self._push.roll_out(self._plan.rollout(current.version), tell)
        if rollout["state"] == "rolled back":
            self._push.remove(current.version)
        return rounds.end(current, rollout["state"], rollout["reason"])


def _by_user[**P, R](what: str, function: Callable[P, R], *given: P.args, **more: P.kwargs) -> R:
    """Calls a function of the TrainSpec, which may raise anything; anybody's feedback may be what it is given."""
    try:
        return function(*given, **more)
    except LeptonError:
        raise
    except Exception as error:
        raise LearningError(f"the TrainSpec's {what} failed: {type(error).__name__}: {first_line(error)}") from error


def _left_out(rows: Labelled) -> str:
    return f" (left out: {rows.foreign}, such as {rows.why})" if rows.foreign else ""


def _check_generator(spec: TrainSpec) -> None:
    for name, what in (
        ("loss", "how a prompt and its right reply are learned"),
        ("examples", "what they are in a batch"),
        ("evaluate", "what must not get worse"),
    ):
        if getattr(spec, name) is None:
            raise LearningError(f"the model generates: give the TrainSpec `{name}`, which says {what}")


def _prompts(rows: Labelled) -> list[list[int]]:
    """The tokens of prompts, without padding."""
    return [row[:size].tolist() for row, size in zip(rows.inputs[PROMPT], rows.inputs[LENGTHS], strict=True)]


def _finite_rows(array: np.ndarray) -> np.ndarray:
    """Which rows have numbers only."""
    if not is_floating(array.dtype):
        return np.ones(len(array), bool)
    return np.isfinite(array).all(axis=tuple(range(1, array.ndim)))


def _with_weights(model: Model, weights: Mapping[str, Any]) -> Model:
    """A model with other weights of the same paths."""
    arrays = {path: jnp.asarray(np.asarray(weights[path])) for path in model.program.weights}
    program = model.program.replace(weights=arrays)
    return Model(
        model.apply,
        {path: arrays[path] for path in model.weights},
        {path: arrays[path] for path in model.state},
        program,
    )
