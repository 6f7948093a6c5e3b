"""Runs the steps of a conversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.conversion.huggingface import HuggingFace
from lepton_xla.conversion.pictures import Decoder
from lepton_xla.conversion.steps import Categories, Conversion, Images, Step, Texts
from lepton_xla.errors import InputError

# Bytes of a text for each token that it may have; what is longer is not worth tokenizing.
_BYTES_PER_TOKEN = 64


class Converter:
    """Converts what clients send into a model's inputs, and outputs into what they get; thread-safe.

    Args:
        conversion: the steps.
        shapes: of the model's inputs, by name; names in them are dimensions that vary.

    Raises:
        ArtifactError: if a tokenizer cannot be read.
        MissingPackageError: if a package is missing.

    >>> from lepton_xla.conversion import Categories, Conversion, Converter
    >>> colors = Categories(vocabulary=("red", "blue"), index="color.index")
    >>> convert = Converter(Conversion(inputs={"color": colors}), {"color.index": ("batch",)})
    >>> convert({"color": ["blue", "pink"]})["color.index"].tolist()
    [2, 0]
    """

    def __init__(self, conversion: Conversion, shapes: Mapping[str, tuple[int | str, ...]]) -> None:
        self.conversion = conversion
        self._shapes = shapes
        self._tools: dict[str, Any] = {}
        for name, step in conversion.inputs.items():
            match step:
                case Texts():
                    data = step.tokenizer.encode()
                    self._tools[name] = HuggingFace(data, step.length, truncate=step.truncate)
                case Images():
                    self._tools[name] = Decoder(step)
                case Categories():
                    self._tools[name] = step.table()

    def takes(self, inputs: Mapping[str, Any]) -> bool:
        """Whether there is something to convert among these."""
        return any(name in inputs for name in self.conversion.inputs)

    def shape_of(self, name: str) -> tuple[int | str, ...]:
        """The shape of what a client sends."""
        step = self.conversion.inputs[name]
        shape = self._shapes[step.gives[0]]
        return shape if isinstance(step, Categories) else shape[:1]

    def row_bytes(self, name: str) -> int:
        """Bytes of memory that one element of an input becomes."""
        return self.conversion.inputs[name].row_bytes

    def __call__(self, inputs: Mapping[str, Any], *, images: int | None = None) -> dict[str, Any]:
        """Convert inputs; those without a step stay as they are.

        Args:
            inputs: texts as `str` or UTF-8 bytes, files of images as bytes; lists or arrays of these.
            images: bound on the pixels to be decoded: those of so many images of the most pixels. Of smaller ones there
                may be more, and of JPEG files, which are decoded at as little as an eighth of their width and height.

        Raises:
            InputError: for a value that cannot be converted; names its row.
        """
        found: dict[str, Any] = {}
        for name, value in inputs.items():
            step = self.conversion.inputs.get(name)
            found |= {name: value} if step is None else self._convert(name, step, value, images)
        return found

    def named(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Put names in the place of indices; an index without a name becomes its number."""
        found = dict(outputs)
        for name, step in self.conversion.outputs.items():
            if name in found:
                texts = names_at(step.names, found[name])
                found[name] = np.array(texts, np.str_).reshape(found[name].shape)
        return found

    def _convert(self, name: str, step: Step, value: Any, images: int | None) -> dict[str, np.ndarray]:
        values = _objects(name, value)
        if isinstance(step, Categories):
            words = [_text(item, f"input {name!r}, element {at}") for at, item in enumerate(values.ravel().tolist())]
            return {step.index: self._indices(name, step, words).reshape(values.shape)}
        if values.ndim != 1:
            kind = "texts" if isinstance(step, Texts) else "files"
            raise InputError(f"input {name!r} has {values.ndim} dimensions; it is a list of {kind}, one a row")
        items = values.tolist()
        return self._tokens(name, step, items) if isinstance(step, Texts) else self._pixels(name, step, items, images)

    def _indices(self, name: str, step: Categories, words: Sequence[str]) -> np.ndarray:
        table: dict[str, int] = self._tools[name]
        found = np.empty(len(words), np.int32)
        for at, word in enumerate(words):
            number = table.get(word, 0 if step.others else -1)
            if number < 0:
                raise InputError(f"input {name!r}, element {at}: {word!r:.100} is not in the vocabulary")
            found[at] = number
        return found

    def _tokens(self, name: str, step: Texts, items: Sequence[Any]) -> dict[str, np.ndarray]:
        most = _BYTES_PER_TOKEN * step.length
        texts: list[str] = []
        for row, item in enumerate(items):
            where = f"input {name!r}, row {row}"
            if isinstance(item, bytes | str) and len(item) > most:
                raise InputError(f"{where}: a text of {len(item)} bytes; at most {most} may be {step.length} tokens")
            texts.append(_text(item, where))
        ids = self._tools[name].encode_all(texts)
        shape = self._shapes[step.tokens]
        longest = max(map(len, ids), default=0)
        if longest > step.length:
            row = max(range(len(ids)), key=lambda each: len(ids[each]))
            raise InputError(f"input {name!r}, row {row}: {longest} tokens; the model takes {step.length}")
        length = step.length if isinstance(shape[1], int) else max(1, longest)
        tokens = np.full((len(ids), length), step.pad, np.int32)
        mask = np.zeros((len(ids), length), np.int32)
        for row, each in enumerate(ids):
            tokens[row, : len(each)] = each
            mask[row, : len(each)] = 1
        return {step.tokens: tokens, **({step.mask: mask} if step.mask else {})}

    def _pixels(self, name: str, step: Images, items: Sequence[Any], images: int | None) -> dict[str, np.ndarray]:
        decoder: Decoder = self._tools[name]
        counted, most = 0, 0 if images is None else images * step.max_pixels
        for row, item in enumerate(items):
            where = f"input {name!r}, row {row}"
            if not isinstance(item, bytes):
                raise InputError(f"{where} is a {type(item).__name__}, not the bytes of a JPEG or PNG file")
            if images is not None and (counted := counted + decoder.count(item, where)) > most:
                raise InputError(f"{where}: more than {most} pixels in one request; send fewer images at once")
        pixels = np.zeros((len(items), step.height, step.width, step.channels), np.uint8)
        sizes = np.ones((len(items), 2), np.int32)
        for row, item in enumerate(items):
            sizes[row] = decoder.decode(item, pixels[row], f"input {name!r}, row {row}")
        return {step.pixels: pixels, step.size: sizes}


def names_at(names: Sequence[str], indices: np.ndarray) -> list[str]:
    """The name at each index, flat; an index without one becomes its number.

    >>> names_at(("cat", "dog"), np.array([1, 7]))
    ['dog', '7']
    """
    flat: list[int] = indices.ravel().tolist()
    return [str(names[at]) if 0 <= at < len(names) else str(at) for at in flat]


def _objects(name: str, value: Any) -> np.ndarray:
    """An array of objects. NumPy would make one of texts, and drop zeros at the end of bytes."""
    if isinstance(value, np.ndarray):
        return value.astype(object)
    if not isinstance(value, list | tuple):
        raise InputError(f"input {name!r} is a {type(value).__name__}, not a list with one value a row")
    items: list[Any] = list(value)
    shape = [len(items)]
    while items and isinstance(items[0], list | tuple):
        lengths = {len(each) if isinstance(each, list | tuple) else -1 for each in items}
        if len(lengths) > 1:
            raise InputError(f"input {name!r} holds lists of different lengths")
        shape.append(lengths.pop())
        items = [item for each in items for item in each]
    found = np.empty(len(items), object)
    for at, item in enumerate(items):
        found[at] = item
    return found.reshape(shape)


def _text(item: Any, where: str) -> str:
    try:
        if isinstance(item, bytes):
            return item.decode()
        if isinstance(item, str):
            item.encode()
            return item
    except UnicodeError as error:
        raise InputError(f"{where} is not UTF-8: {error}") from error
    raise InputError(f"{where} is a {type(item).__name__}, not a text")
