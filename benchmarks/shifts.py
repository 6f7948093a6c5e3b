"""Learning while serving: how much of the accuracy that a shift of the data takes comes back. A section of
`operations.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import harness
import jax
import numpy as np
import optax
from server_process import Server, free_port

import lepton_xla as lx
from lepton_xla import train
from lepton_xla.learning.masters import read_master, write_master
from lepton_xla.learning.rounds import Rounds
from lepton_xla.samples import Samples
from lepton_xla.serve.client import Client, RequestError
from lepton_xla.serve.models.repository import Repository

sys.path.insert(0, str(harness.ROOT / "examples"))
import digits

FOLDER = harness.ROOT / "build" / "learning"
NAME, TARGET = "digits", 0.8
STEPS, BATCH = 400, 64
BUCKETS = {"batch": (1, 8, 32, 128)}
# Images to train on, and those of users; accuracy is that of the rest, which nobody learns from.
TRAINED, USERS = 700, 700
# The longest run, how long one goes on once it has what it is for, before the shift, and of the slow one.
SECONDS, AFTER_S, CALM_S, RAMP_S = 240.0, 10.0, 5.0, 30.0
PAUSE_S = 0.004
ROLLOUT = {"stages": [{"shadow": 0.5, "answers": 100}, {"share": 0.2, "answers": 100}, {"share": 0.5, "answers": 200}]}
PLOT = "learning.svg"

INTRODUCTION = (
    "## Learning while serving\n\nA small CNN on handwritten digits (8 x 8 pixels; 700 images to train on), in int8, "
    "is served, and the images of its users shift after five seconds: inverted, turned by a quarter, or darkened "
    "within half a minute to a fifth. The right answer of each request is given as feedback. `leptonx learn --loop` "
    "runs beside the server: it trains on from samples of the requests mixed with old images, judges, and has each "
    "better version rolled out as a shadow, to a fifth, a half, and all of the requests. Accuracy is that of 397 "
    "images that neither users send nor anybody trains on, asked of the server once a second. `regained` is the share "
    "of the accuracy that the shift takes which is there in the end, which comes ten seconds after a promotion that "
    f"brings {TARGET:.0%} of it back; during the rollout either version may answer. That is the aim; a run "
    "that does not reach it ends after four minutes."
)


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels in one fixed order."""
    found = digits.data()
    images, labels = np.concatenate(found[::2]), np.concatenate(found[1::2])
    order = np.random.default_rng(0).permutation(len(labels))
    return images[order], labels[order]


def _batch(step: int) -> dict[str, np.ndarray]:
    images, labels = data()
    rows = np.random.default_rng([0, step]).integers(0, TRAINED, BATCH)
    return {"image": images[rows], "label": labels[rows]}


def _model() -> train.Model:
    net = digits.DigitsNet()
    variables = net.init(jax.random.key(2), data()[0][:1])
    return train.from_linen(net, variables, {"image": lx.TensorSpec(("batch", 8, 8, 1), "float32")})


def _updates(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(2e-3, steps))


def _trained() -> train.Model:
    """The model with the weights that were served first."""
    model, weights = _model(), read_master(FOLDER / "first.npz")
    arrays = {path: jax.numpy.asarray(leaf) for path, leaf in weights.items()}
    parts = ({path: arrays[path] for path in part} for part in (model.weights, model.state))
    return train.Model(model.apply, *parts, model.program.replace(weights=arrays))


def _evaluate(predict: Callable[..., Any]) -> dict[str, float]:
    """Accuracy on old images that were not trained on and are not asked of the server: those of users, unshifted."""
    images, labels = (each[TRAINED : TRAINED + USERS] for each in data())
    return {"accuracy": float((predict(image=images)["output"].argmax(-1) == labels).mean())}


def spec() -> train.TrainSpec:
    """What `leptonx learn` trains."""
    return train.TrainSpec(_trained, _batch, STEPS, _updates, evaluate=_evaluate)


SHIFTS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "inverted": lambda images, _: 1 - images,
    "turned": lambda images, _: np.ascontiguousarray(np.rot90(images, axes=(1, 2))),
    "darkened": lambda images, seconds: images * np.float32(1 - 0.8 * min(1.0, seconds / RAMP_S)),
}
"""Images and seconds since the shift began -> what users send."""


def first_version(steps: int) -> pathlib.Path:
    """Trains the model, and makes the artifact that is served first."""
    model = _model()
    program = train.fit(
        model, train.supervised(model), _updates(steps), _batch, steps=steps, progress=False
    ).program  # fmt: skip
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_master(FOLDER / "first.npz", program.weights)
    # Without measurements the same recipe makes the same program in the learner's process.
    recipe = lx.Recipe.load("int8").replace({"measure": False})
    images = [{"image": _batch(step)["image"]} for step in range(4)]
    small = lx.optimize(program, recipe, calibration=images, buckets=BUCKETS)
    path = FOLDER / "first.lepton"
    lx.compile(small, BUCKETS, name=NAME, recipe=recipe).save(path, overwrite=True)
    return path


class _Users:
    """Requests with the feedback to them, from a thread; and what was answered."""

    def __init__(self, url: str, shift: Callable[[np.ndarray, float], np.ndarray], calm_s: float) -> None:
        self.asked = self.failed = 0
        self.begun_s = time.monotonic()
        self._url, self._shift, self._calm_s = url, shift, calm_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def shifted(self, images: np.ndarray) -> np.ndarray:
        """Images as users send them now."""
        seconds = time.monotonic() - self.begun_s - self._calm_s
        return images if seconds < 0 else self._shift(images, seconds)

    def _run(self) -> None:
        images, labels = (each[TRAINED : TRAINED + USERS] for each in data())
        draw = np.random.default_rng(1)
        with Client(self._url, retries=0) as client:
            while not self._stop.wait(PAUSE_S):
                row, name = int(draw.integers(USERS)), f"{self.asked}"
                self.asked += 1
                try:
                    client.infer(NAME, image=self.shifted(images[row : row + 1]), request_id=name)
                    client.feedback(NAME, {name: int(labels[row])})
                except RequestError:
                    self.failed += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _accuracy(predict: Callable[..., Any], images: np.ndarray) -> float:
    labels = data()[1][TRAINED + USERS :]
    return float((np.asarray(predict(image=images)["output"]).argmax(-1) == labels).mean())


def _shift(name: str, base: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """One shift, from the first request to the last."""
    calm_s, longest_s = (1.0, 40.0) if options.quick else (CALM_S, SECONDS)
    whole_s = calm_s + (RAMP_S if name == "darkened" else 0)
    unseen = data()[0][TRAINED + USERS :]
    first, shift = lx.load(base), SHIFTS[name]
    clean, taken = _accuracy(first, unseen), _accuracy(first, shift(unseen, RAMP_S))
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        Repository(folder / "models").push(base, NAME)
        port = free_port()
        program = [sys.executable, "-m", "lepton_xla"]
        server = Server(
            "learning",
            [*program, "serve", str(folder / "models"), "--port", str(port), "--samples", str(folder / "samples"),
             "--repository-poll-s", "0.2"],
            port, f"/v2/models/{NAME}", (None, {}), {"JAX_PLATFORMS": "cpu"},  # type: ignore[arg-type]
        )  # fmt: skip
        stack.callback(server.stop)
        server.wait()
        url = f"http://127.0.0.1:{port}"
        (folder / "rollout.json").write_text(json.dumps(ROLLOUT))
        command = [
            *program, "learn", f"{__file__}:spec", "--samples", folder / "samples", "--base", base, "--server", url,
            "--folder", folder / "learning", "--loop", "--every", "1s", "--rollout", folder / "rollout.json",
            "--steps", "40" if options.quick else STEPS, "--json",
        ]  # fmt: skip
        log = stack.enter_context(open(folder / "learner.log", "wb"))
        learner = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env={**os.environ, "JAX_PLATFORMS": "cpu"}
        )  # fmt: skip
        users = _Users(url, shift, calm_s)
        stack.callback(learner.wait)
        stack.callback(learner.send_signal, signal.SIGKILL)
        stack.callback(users.stop)
        curve: list[tuple[float, float, str]] = []
        client = stack.enter_context(Client(url))
        reached_s = longest_s
        for tick in itertools.count(1):
            now_s = time.monotonic() - users.begun_s
            if now_s > min(reached_s + AFTER_S, longest_s):
                break
            accuracy = _accuracy(functools.partial(client.infer, NAME), users.shifted(unseen))
            stable = Repository(folder / "models").find(NAME).settings.labels.get("stable", "1")
            curve.append((now_s, accuracy, stable))
            if now_s > whole_s and stable != "1" and accuracy >= taken + TARGET * (clean - taken):
                reached_s = min(reached_s, now_s)
            else:
                reached_s = longest_s
            time.sleep(max(0.0, tick - (time.monotonic() - users.begun_s)))
        users.stop()
        stable = Repository(folder / "models").find(NAME).settings.labels.get("stable", "1")
        with Client(url) as client:
            ask = functools.partial(client.infer, NAME)
            ends = [_accuracy(ask, images) for images in (shift(unseen, RAMP_S), unseen)]
        rounds = Rounds(folder / "learning", NAME).history()
        if not rounds:
            print((folder / "learner.log").read_text(errors="replace")[-2000:])
        kept = Samples(folder / "samples", NAME)
    lost = clean - taken
    regained = (ends[0] - taken) / lost if lost else 1.0
    return {
        "shift": name, "clean": clean, "taken": taken, "regained": regained, "shifted_end": ends[0],
        "clean_end": ends[1], "requests": users.asked, "failed": users.failed, "samples": kept.count,
        "labelled": kept.labelled, "rounds": len(rounds), "stable": stable,
        "promoted": sum(each.phase == "promoted" for each in rounds),
        "after_s": None if reached_s == longest_s else reached_s - calm_s, "calm_s": calm_s, "curve": curve,
        "promoted_at": [
            next(s for s, _, label in curve if label == each.version)
            for each in rounds
            if each.phase == "promoted" and any(label == each.version for *_, label in curve)
        ],
    }  # fmt: skip


def measure(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """One row a shift, when all are there."""
    base = first_version(60 if options.quick else 600)
    rows = [_shift(name, base, options) for name in list(SHIFTS)[: 1 if options.quick else None]]
    if not options.quick:
        draw(rows, harness.PAGES / PLOT)
    for row in rows:
        row["line"] = _line(row.pop("curve"))
    yield rows


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Accuracy over time, if matplotlib is there."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return
    matplotlib.rcParams["svg.hashsalt"] = "learning"  # otherwise the file differs each time
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), sharey=True), rows, strict=True):
        axes.plot([s for s, *_ in row["curve"]], [accuracy for _, accuracy, _ in row["curve"]])
        axes.axvline(row["calm_s"], color="firebrick", linestyle=":", label="shift begins")
        for index, at in enumerate(row["promoted_at"]):
            axes.axvline(at, color="gray", linestyle="--", label=None if index else "version promoted")
        axes.axhline(row["clean"], color="tab:green", linewidth=0.8, label="without shift")
        axes.axhline(row["taken"], color="firebrick", linewidth=0.8, label="without learning")
        axes.set(title=row["shift"], xlabel="seconds", ylim=(0, 1.02))
    figure.axes[0].set_ylabel("accuracy on unseen images")
    figure.axes[0].legend(loc="lower right", fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def _line(curve: list[tuple[float, float, str]], width: int = 60) -> str:
    """The curve in one line of text, for a terminal."""
    bars = "▁▂▃▄▅▆▇█"
    step = max(1, -(-len(curve) // width))
    means = [float(np.mean([accuracy for _, accuracy, _ in curve[i : i + step]])) for i in range(0, len(curve), step)]
    return "".join(bars[min(7, int(8 * mean))] for mean in means)


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    header = (
        "shift", "before", "with the shift", "in the end", "regained", "80 % after", "old images in the end",
        "labelled requests", "failed", "rounds", "promoted",
    )  # fmt: skip
    lines = [
        (
            row["shift"], f"{row['clean']:.1%}", f"{row['taken']:.1%}", f"{row['shifted_end']:.1%}",
            f"{row['regained']:.0%}", "never" if row["after_s"] is None else f"{row['after_s']:.0f} s",
            f"{row['clean_end']:.1%}", row["labelled"], row["failed"], row["rounds"], row["promoted"],
        )
        for row in rows
    ]  # fmt: skip
    curves = "\n".join(f"    {row['shift']:10} {row['line']}" for row in rows)
    found = [harness.markdown(header, lines), f"Accuracy over the time of each run:\n\n{curves}"]
    if (harness.PAGES / PLOT).exists() and len(rows) == len(SHIFTS):
        found.append(f"![accuracy over time]({PLOT})")
    return found
