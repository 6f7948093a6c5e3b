"""What is converted and how, as data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from lepton_xla.errors import ArtifactError, ModelError

# In an artifact.
FILE = "conversion.json"

type Count = Annotated[int, msgspec.Meta(ge=1)]


class _Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what is read from a file; unknown and mistyped keys are errors."""


class Texts(_Step, frozen=True, kw_only=True, tag="texts"):
    """UTF-8 texts to token ids.

    Attributes:
        tokenizer: its JSON, as Hugging Face's `tokenizers` writes it.
        tokens: the model's input that takes the ids, int32 `[rows, length]`.
        mask: the input that is 1 for tokens and 0 for padding, int32; empty if there is none.
        length: largest number of tokens of a text.
        pad: the id behind the end of a text.
        truncate: whether a longer text is cut; else it is refused.

    >>> Texts(tokenizer="{}", length=8).gives
    ('tokens',)
    """

    tokenizer: str
    tokens: str = "tokens"
    mask: str = ""
    length: Count
    pad: int = 0
    truncate: bool = False

    @property
    def gives(self) -> tuple[str, ...]:
        """The model's inputs that it makes."""
        return (self.tokens, self.mask) if self.mask else (self.tokens,)

    @property
    def row_bytes(self) -> int:
        """Bytes of memory that one row takes."""
        return 4 * self.length * len(self.gives)

    def described(self) -> str:
        """One line for people."""
        longer = "longer texts are cut" if self.truncate else "longer texts are refused"
        return f"UTF-8 text to at most {self.length} tokens ({', '.join(self.gives)}); {longer}"


class Images(_Step, frozen=True, kw_only=True, tag="images"):
    """JPEG and PNG files to pixels, in the corner of a canvas of one size for all.

    Attributes:
        pixels: the model's input that takes them, uint8 `[rows, height, width, channels]`.
        size: the input that takes the height and the width of each image, int32 `[rows, 2]`.
        height, width: of the canvas. A larger image is shrunk to it.
        channels: 1 for gray, 3 for red, green and blue.
        max_pixels: more are refused before anything is decoded.

    >>> Images(pixels="x.pixels", size="x.size", height=32, width=32, channels=3).row_bytes
    3072
    """

    pixels: str
    size: str
    height: Count
    width: Count
    channels: Annotated[int, msgspec.Meta(ge=1, le=3)]
    max_pixels: Count = 1 << 24

    @property
    def gives(self) -> tuple[str, ...]:
        """The model's inputs that it makes."""
        return (self.pixels, self.size)

    @property
    def row_bytes(self) -> int:
        """Bytes of memory that one row takes."""
        return self.height * self.width * self.channels

    def described(self) -> str:
        """One line for people."""
        kind = "gray" if self.channels == 1 else "color"
        return f"JPEG or PNG file to {kind} pixels, at most {self.height} x {self.width} ({self.pixels}, {self.size})"


class Categories(_Step, frozen=True, kw_only=True, tag="categories"):
    """Words of a vocabulary to their indices.

    Attributes:
        vocabulary: the words; the n-th has the index n + 1 if there is a place for others, else n.
        index: the model's input that takes the indices, int32.
        others: whether words that are not in the vocabulary have the index 0; else they are refused.

    >>> Categories(vocabulary=("red", "blue"), index="color.index").table()
    {'red': 1, 'blue': 2}
    """

    vocabulary: tuple[str, ...]
    index: str
    others: bool = True

    @property
    def gives(self) -> tuple[str, ...]:
        """The model's inputs that it makes."""
        return (self.index,)

    @property
    def row_bytes(self) -> int:
        """Bytes of memory that one value takes."""
        return 4

    def table(self) -> dict[str, int]:
        """Index of each word."""
        return {word: number for number, word in enumerate(self.vocabulary, int(self.others))}

    def described(self) -> str:
        """One line for people."""
        others = "others are 0" if self.others else "others are refused"
        return f"one of {len(self.vocabulary)} words to its index ({self.index}); {others}"


class Labels(_Step, frozen=True, kw_only=True, tag="labels"):
    """Indices to names.

    Attributes:
        names: of the classes, in order.

    >>> Labels(names=("cat", "dog")).described()
    'the name of one of 2 classes'
    """

    names: tuple[str, ...]

    def described(self) -> str:
        """One line for people."""
        return f"the name of one of {len(self.names)} classes"


type Step = Texts | Images | Categories


class Conversion(_Step, frozen=True, kw_only=True):
    """All steps of a model: before its compiled code, and after it.

    Attributes:
        inputs: name of what a client sends -> step. The model's other inputs are sent as they are.
        outputs: name of an output of integers -> names that are given in its place.

    >>> colors = Categories(vocabulary=("red",), index="color.index")
    >>> Conversion.from_json(Conversion(inputs={"color": colors}).to_json()).inputs["color"].vocabulary
    ('red',)
    """

    inputs: dict[str, Step] = {}
    outputs: dict[str, Labels] = {}

    @property
    def made(self) -> dict[str, str]:
        """The model's inputs that steps make -> what they are made of.

        >>> Conversion(inputs={"c": Categories(vocabulary=("red",), index="i")}).made
        {'i': 'c'}
        """
        return {name: raw for raw, step in self.inputs.items() for name in step.gives}

    def check(self, inputs: dict[str, tuple[tuple[int | str, ...], str]], outputs: dict[str, str]) -> None:
        """Check that it fits a model.

        Args:
            inputs: name -> shape and dtype.
            outputs: name -> dtype.

        Raises:
            ModelError: for an input or output that is not there or cannot take what is made; names it.

        >>> Conversion(inputs={"c": Categories(vocabulary=("red",), index="i")}).check({}, {})
        Traceback (most recent call last):
        lepton_xla.errors.ModelError: 'c' becomes the input 'i', which the model has not; it has no inputs
        """
        for name, raw in self.made.items():
            if name not in inputs:
                has = ", ".join(map(repr, inputs)) or "no inputs"
                raise ModelError(f"{raw!r} becomes the input {name!r}, which the model has not; it has {has}")
        for raw, step in self.inputs.items():
            if raw in inputs:
                raise ModelError(f"{raw!r} is an input of the compiled model too; call what a client sends otherwise")
            _check_step(raw, step, inputs)
        for name in self.outputs:
            if not outputs.get(name, "").startswith(("int", "uint")):
                raise ModelError(f"labels are for an output of integers, and {name!r} is {outputs.get(name, 'none')}")

    def to_json(self) -> bytes:
        """Encode it.

        >>> Conversion().to_json()
        b'{"inputs":{},"outputs":{}}'
        """
        return msgspec.json.encode(self)

    @staticmethod
    def from_json(data: bytes) -> Conversion:
        """Decode it.

        Raises:
            ArtifactError: if that is not what it is.

        >>> Conversion.from_json(b'{"inputs": {}}')
        Conversion(inputs={}, outputs={})
        """
        try:
            return msgspec.json.decode(data, type=Conversion)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ArtifactError(f"the conversion of inputs cannot be read: {error}") from error


class Summary(_Step, frozen=True, kw_only=True):
    """What a manifest says of a conversion.

    Attributes:
        inputs, outputs: name -> what it becomes, or is; for people.
        made: the model's inputs that are made -> what they are made of.
        file: the steps.

    >>> colors = Categories(vocabulary=("red",), index="color.index")
    >>> Summary.of(Conversion(inputs={"color": colors})).taken(["color.index", "x"])
    ['color', 'x']
    """

    inputs: dict[str, str]
    outputs: dict[str, str]
    made: dict[str, str]
    file: str = FILE

    @staticmethod
    def of(conversion: Conversion) -> Summary:
        """The summary of a conversion.

        >>> Summary.of(Conversion()).file
        'conversion.json'
        """
        return Summary(
            inputs={name: step.described() for name, step in conversion.inputs.items()},
            outputs={name: step.described() for name, step in conversion.outputs.items()},
            made=conversion.made,
        )

    def taken(self, inputs: Iterable[str]) -> list[str]:
        """What clients send, for a model of these inputs."""
        return list(dict.fromkeys(self.made.get(name, name) for name in inputs))


def _check_step(raw: str, step: Step, inputs: dict[str, tuple[tuple[int | str, ...], str]]) -> None:
    wanted: tuple[tuple[int | str | None, ...], str]
    for name in step.gives:
        shape, dtype = inputs[name]
        match step:
            case Texts():
                length = shape[1] if len(shape) == 2 and isinstance(shape[1], str) else step.length
                wanted = (None, length), "int32"
            case Images() if name == step.pixels:
                wanted = (None, step.height, step.width, step.channels), "uint8"
            case Images():
                wanted = (None, 2), "int32"
            case Categories():
                wanted = shape or (None,), "int32"
        fits = len(shape) == len(wanted[0]) and shape[1:] == wanted[0][1:] and isinstance(shape[0], str)
        if not fits or dtype != wanted[1]:
            shown = ", ".join(["rows", *(str(size) for size in wanted[0][1:])])
            raise ModelError(
                f"{raw!r} becomes {wanted[1]}[{shown}], and the model's input {name!r} is {dtype}"
                f"[{', '.join(map(str, shape))}]"
            )
