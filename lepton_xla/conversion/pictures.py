"""JPEG and PNG files to pixels, by Pillow, which the extra `image` installs. Limits are checked before decoding."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Generator
from typing import Any

import numpy as np

from lepton_xla.conversion.steps import Images
from lepton_xla.environment.extras import Needs
from lepton_xla.errors import InputError

_WHITE = 255


class Decoder:
    """Decodes the images of one input.

    JPEG files that are much larger than the canvas are decoded at a half, a quarter or an eighth of their size. Images
    are turned as their EXIF orientation says; CMYK becomes RGB; of 16 bits the upper 8 are kept; what is transparent is
    laid on white; of several images in one file the first is taken.

    Args:
        step: what to make of them.

    Raises:
        MissingPackageError: if the package Pillow is missing.
    """

    def __init__(self, step: Images) -> None:
        with Needs("image", "a model that takes images"):
            self._image: Any = importlib.import_module("PIL.Image")
            self._ops: Any = importlib.import_module("PIL.ImageOps")
        self._step = step
        self._bomb = (self._image.DecompressionBombError, self._image.DecompressionBombWarning)

    def count(self, data: bytes, where: str) -> int:
        """Pixels that decoding a file makes, from its header.

        Raises:
            InputError: as `decode`.
        """
        with self._opened(data, where) as image:
            width, height = image.size
            return width * height

    @contextlib.contextmanager
    def _opened(self, data: bytes, where: str) -> Generator[Any]:
        """An image of which only the header is read, at the size that it will be decoded at."""
        step = self._step
        try:
            with self._image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                width, height = image.size
                if width * height > step.max_pixels:
                    raise InputError(f"{where} has {width} x {height} pixels, more than {step.max_pixels}")
                if image.format == "JPEG" and image.mode in ("L", "RGB", "YCbCr"):
                    side = max(step.height, step.width)
                    image.draft(image.mode, (side, side))
                yield image
        except InputError:
            raise
        except self._bomb as error:
            raise InputError(f"{where} has more than {step.max_pixels} pixels") from error
        except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error and others
            raise InputError(f"{where} is no whole JPEG or PNG file: {_short(error)}") from error

    def decode(self, data: bytes, canvas: np.ndarray, where: str) -> tuple[int, int]:
        """Decode one file into the upper left corner of a canvas.

        Args:
            data: the file.
            canvas: uint8 `[height, width, channels]`, zeros.
            where: what errors call it.

        Returns:
            Height and width of the image there.

        Raises:
            InputError: if it is neither JPEG nor PNG, is damaged, or has too many pixels.
        """
        step = self._step
        with self._opened(data, where) as image:
            found = self._as_mode(self._ops.exif_transpose(image))
        if found.width > step.width or found.height > step.height:
            found.thumbnail((step.width, step.height), self._image.Resampling.BILINEAR, reducing_gap=None)
        pixels = np.asarray(found)
        canvas[: found.height, : found.width] = pixels.reshape(found.height, found.width, step.channels)
        return found.height, found.width

    def _as_mode(self, image: Any) -> Any:
        """Gray or RGB of 8 bits."""
        wanted = "L" if self._step.channels == 1 else "RGB"
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
            upper = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            image = self._image.fromarray(upper)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = self._image.new("RGBA", image.size, (_WHITE,) * 4)
            image = self._image.alpha_composite(white, image)
        image.load()
        return image.convert(wanted)


def _short(error: Exception) -> str:
    return str(error).partition("<_io")[0].strip()[:200] or type(error).__name__
