"""What the commands take: the small network that run.py trained, to be made smaller, and to learn on.

leptonx tune examples/apps/images/targets.py:model --metric right --max-drop 0.2 --objective bytes
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import digits_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reports
import training

import lepton_xla as lx
from lepton_xla import train

SIZES = (1, 8)
CHANGED = 2000  # images that formats are chosen by too: of 500 alone, one lost 0.8 % of others and nothing of these
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def settings() -> dict[str, int]:
    """The run whose first network is meant: `steps`."""
    file = reports.folder() / "images" / "settings.json"
    return json.loads(file.read_text()) if file.exists() else {"steps": training.STEPS}


def with_files(program: lx.Program) -> lx.Program:
    """The program that takes JPEG files and gives names, probabilities, and the scores of all classes."""
    fn = program.fn

    def twice(weights, image):
        scores = fn(weights, image)
        return {"output": scores, "scores": scores}

    spec = lx.TensorSpec(("batch", 10), "float32")
    doubled = program.replace(fn=twice, outputs={"output": spec, "scores": spec})
    return lx.give_labels(lx.take_images(doubled, "image", canvas=(28, 28)), NAMES)


def pixels(images: np.ndarray) -> dict[str, np.ndarray]:
    """Images as the host decodes them."""
    whole = (images * 255).round().astype(np.uint8)
    return {"image.pixels": whole, "image.size": np.full((len(images), 2), 28, np.int32)}


@functools.cache
def to_choose_by() -> tuple[np.ndarray, np.ndarray]:
    """The images that nothing is trained on, some of the others changed as none was that is trained on, and labels."""
    known = digits_data.data()
    changed = digits_data.augmented(known.images[:CHANGED], np.random.default_rng(11))
    images, labels = [known.choosing, changed], [known.choosing_labels, known.labels[:CHANGED]]
    return np.concatenate(images), np.concatenate(labels)


def right(predict) -> dict[str, float]:
    """Of the images to choose by, the accuracy, and the mean probability of the right class."""
    images, labels = to_choose_by()
    scores = np.asarray(predict(**pixels(images))["scores"])
    likely = np.asarray(jax.nn.softmax(jnp.asarray(scores), axis=-1))[np.arange(len(scores)), labels]
    return {"accuracy": float((scores.argmax(-1) == labels).mean()), "right": float(likely.mean())}


def small() -> lx.Program:
    """The network, in float, of images."""
    return training.student(0, settings()["steps"])


@functools.cache
def model() -> lx.ModelSpec:
    """For `leptonx tune` and `leptonx eval`."""
    known, program = digits_data.data(), small()
    return lx.ModelSpec(
        fn=program.fn, weights=program.weights, inputs=program.inputs, convert=with_files, buckets={"batch": SIZES},
        calibration=[pixels(known.images[k : k + 64]) for k in range(0, 512, 64)], evaluate=right,
        rows=lambda: {**pixels(known.judged), "label": known.judged_labels},
    )  # fmt: skip


def learning() -> train.TrainSpec:
    """For `leptonx learn`."""
    untrained, program = training.model(0, training.SMALL), small()
    known, served = training.goes_on(untrained, program), with_files(program)

    def apply(weights, state, key, seen, size):
        scores, state = known.apply(weights, state, key, seen.astype(jnp.float32) / 255)
        return {"scores": scores}, state

    def loss(weights, batch, key, state):
        found, state = apply(weights, state, key, batch["image.pixels"], batch["image.size"])
        each = optax.softmax_cross_entropy_with_integer_labels(found["scores"], batch["label"])
        return each.mean(), {}, state

    data = digits_data.data()
    batch = training.batches_of(data.images, data.labels, 7)

    def old(step: int) -> dict[str, np.ndarray]:
        made = batch(step)
        return {**pixels(made["image"]), "label": made["label"]}

    return train.TrainSpec(
        train.Model(apply, known.weights, known.state, served), old, 150,
        lambda steps: optax.adam(optax.cosine_decay_schedule(2e-3, steps)), loss=loss,
        evaluate=lambda predict: {"accuracy": right(predict)["accuracy"]}, options={"ema": 0.97},
    )  # fmt: skip
