"""Trains the network on everything but everybody's last two films; the last but one says which weights are kept."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import films as data
import network
import numpy as np
import optax
import ranking
import reports
import runs

import lepton_xla as lx
from lepton_xla import train

EPOCHS, BATCH, RATE, DECAY, LOOKS = 30, 64, 2e-3, 0.02, 8


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained on.

    Attributes:
        films: sessions and films.
        features: what is known of films, by name: a row each.
        epochs: of training.
        ids: whether each film has a vector of its own too.
    """

    films: data.Films
    features: Mapping[str, np.ndarray]
    epochs: int
    ids: bool = True

    @property
    def parts(self) -> list[str]:
        """What a film's vector is made of."""
        return ["ids"] * self.ids + list(self.features)

    def without(self, name: str) -> Setting:
        """Films of which one part is not known."""
        rest = {key: each for key, each in self.features.items() if key != name}
        return dataclasses.replace(self, features=rest, ids=self.ids and name != "ids")

    def served(self, seed: int, missing: str = "") -> lx.Program:
        """What is trained, as it is served; to films of which one part is missing, if one is named."""
        weights = trained(self, seed)
        features = {key: each * np.float32(key != missing) for key, each in self.features.items()}
        if missing == "ids":
            weights["films"] = np.zeros_like(weights["films"])
        return network.served(weights, features, self.films.years)


def setting(epochs: int, *, made_up: bool) -> Setting:
    """MovieLens or made-up films, with all features that there are."""
    films = data.made_up() if made_up else data.load()
    titles = None if made_up else data.title_vectors(films, reports.folder() / "recommender")
    features = {"genres": films.genres, "years": data.year_table(films.years)}
    return Setting(films, features | ({"titles": titles} if titles is not None else {}), epochs)


def trained(own: Setting, seed: int) -> dict[str, Any]:
    """Train once, then read what was trained; a run that was broken off goes on."""
    name = f"{own.films.count}-{'-'.join(own.parts)}-{own.epochs}-{seed}"
    folder = reports.folder() / "recommender" / "runs"
    return runs.once(folder / f"{name}.npz", lambda: _fitted(own, seed, folder / name))


def _fitted(own: Setting, seed: int, folder: pathlib.Path) -> Mapping[str, Any]:
    films = own.films
    windows = films.windows()
    program = network.to_train(network.begin(films.count, own.features, seed, ids=own.ids), own.features, films.years)
    count = len(windows["next"])
    each = max(1, count // BATCH)
    steps = own.epochs * each

    def batch(step: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(step, each)
        order = np.random.default_rng((seed, epoch)).permutation(count)
        rows = order[np.arange(place * BATCH, (place + 1) * BATCH) % count]
        return {name: array[rows] for name, array in windows.items()}

    inputs, last, seen = films.tests(place=2)

    def evaluate(predict: Any) -> dict[str, float]:
        return ranking.judge(np.asarray(predict(**inputs)["output"]).astype(np.float64), last, seen)

    found = train.fit(
        program, network.sampled_softmax(own.features, films.years),
        optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=DECAY), batch, steps=steps, clip_norm=1.0,
        seed=seed, progress=False, checkpoint=train.Checkpoints(folder, every=max(1, steps // LOOKS), keep=1),
        evaluate=train.Evaluation(evaluate, max(1, steps // LOOKS), metric="pairwise"),
    )  # fmt: skip
    return found.program.weights
