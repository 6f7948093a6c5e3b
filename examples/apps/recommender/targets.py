"""What the commands take: the network that run.py trained first, to be made smaller, and to learn on.

leptonx tune examples/apps/recommender/targets.py:model --metric pairwise --max-drop 0.5 --objective bytes
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import films as data
import jax.numpy as jnp
import network
import numpy as np
import optax
import ranking
import reports
import training

import lepton_xla as lx
from lepton_xla import train

SIZES = (1, 8)


@functools.cache
def setting() -> training.Setting:
    """Films and features of the run that is meant."""
    file = reports.folder() / "recommender" / "settings.json"
    known = json.loads(file.read_text()) if file.exists() else {"epochs": training.EPOCHS, "made_up": False}
    return training.setting(known["epochs"], made_up=known["made_up"])


@functools.cache
def program() -> lx.Program:
    """The first network, with its features added to the films, that gives the best films and the scores of all."""
    return network.with_top(setting().served(0), ranking.TOP, whole=True)


def found_again(predict) -> dict[str, float]:
    """How well the films before everybody's last are found."""
    inputs, last, seen = setting().films.tests(place=2)
    return ranking.judge(np.asarray(predict(**inputs)["scores"]).astype(np.float64), last, seen)


@functools.cache
def model() -> lx.ModelSpec:
    """For `leptonx tune`."""
    inputs, _, _ = setting().films.tests(place=2)
    own, starts = program(), range(0, min(640, len(inputs["session"])), 64)
    return lx.ModelSpec(
        fn=own.fn, weights=own.weights, inputs=own.inputs, buckets={"batch": SIZES}, evaluate=found_again,
        calibration=[{name: each[k : k + 64] for name, each in inputs.items()} for k in starts],
    )  # fmt: skip


def learning() -> train.TrainSpec:
    """For `leptonx learn`."""
    own, films = program(), setting().films
    windows = films.windows()
    ends = (windows["next"] > 0).sum(1) > 0
    windows = {name: each[ends] for name, each in windows.items()}

    def old(step: int) -> dict[str, np.ndarray]:
        """Sessions up to some film, and the one that follows it."""
        random = np.random.default_rng([9, step])
        rows = random.integers(0, len(windows["next"]), 64)
        length = windows["next"].shape[1]
        known = (windows["next"][rows] > 0).sum(1)
        stop = length - random.integers(0, np.maximum(known, 1))
        places = np.arange(length) - length + stop[:, None]
        session = np.where(places >= 0, np.take_along_axis(windows["session"][rows], np.maximum(places, 0), 1), 0)
        at = np.arange(64), stop - 1
        return {
            "session": session.astype(np.int32), "year": windows["year"][rows][at], "label": windows["next"][rows][at],
        }  # fmt: skip

    def loss(weights, batch, key, state):
        scores = own.fn({**weights, **state}, batch["session"], batch["year"])["scores"]
        # A film that was seen has no chance; as a label, it is left out.
        each = optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"])
        known = (jnp.take_along_axis(scores, batch["label"][:, None], 1)[:, 0] > -1e8).astype(jnp.float32)
        return (each * known).sum() / jnp.maximum(known.sum(), 1.0), {}, state

    return train.TrainSpec(
        own, old, 150, lambda steps: optax.adam(optax.cosine_decay_schedule(2e-3, steps)), loss=loss,
        evaluate=lambda predict: {"pairwise": found_again(predict)["pairwise"]},
    )  # fmt: skip


def festival(films: data.Films, count: int = 40) -> np.ndarray:
    """Films that everybody watches all of a sudden: of the middle of the list of the popular ones."""
    seen = np.bincount(np.concatenate([each[:-2] for each in films.sessions]), minlength=films.count + 1)[1:]
    order = 1 + np.argsort(-seen, kind="stable")
    start = len(order) // 4
    return order[start : start + count]
