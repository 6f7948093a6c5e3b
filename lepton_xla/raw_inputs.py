"""Programs that take texts, images and words, and give names: `Conversion` on the host, the rest compiled."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.conversion import Categories, Conversion, Images, Labels, Texts
from lepton_xla.errors import ModelError
from lepton_xla.program import Expansion, Program, TensorSpec
from lepton_xla.trees import name_leaves

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt8

type _Fn = Callable[..., Any]


@takes(program=Program)
def take_texts(
    program: Program,
    tokenizer: bytes | str | os.PathLike[str],
    *,
    name: str = "text",
    tokens: str = "tokens",
    mask: str = "",
    length: int | None = None,
    pad: int = 0,
    truncate: bool = False,
) -> Program:
    """Have a program take texts instead of token ids.

    Args:
        program: takes ids, int32 `[rows, length]`.
        tokenizer: JSON of Hugging Face's `tokenizers`, or the path of its file. It is stored in the artifact; what it
            says of lengths and padding is not used.
        name: what clients call the texts.
        tokens: the input for the ids.
        mask: the input that is 1 for tokens and 0 for padding, int32, if there is one.
        length: largest number of tokens; by default that of the input, which then has to be fixed.
        pad: the id behind the end of a text.
        truncate: whether longer texts are cut; else they are refused.

    Raises:
        ModelError: if the program has no such inputs, or the tokenizer cannot be read.

    >>> words = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"?": 0, "hello": 1}, "unk_token": "?"}}'
    >>> ids = {"tokens": lx.TensorSpec(("batch", 4), "int32")}
    >>> program = lx.take_texts(lx.trace(lambda w, tokens: w[tokens], jnp.ones(2), ids), words)
    >>> program.converted({"text": ["hello"]})["tokens"].tolist()
    [[1, 0, 0, 0]]
    """
    if isinstance(tokenizer, os.PathLike) or (isinstance(tokenizer, str) and not tokenizer.lstrip().startswith("{")):
        try:
            tokenizer = pathlib.Path(tokenizer).read_bytes()
        except OSError as error:
            raise ModelError(f"the tokenizer {os.fspath(tokenizer)!r} cannot be read: {error.strerror}") from error
    if isinstance(tokenizer, bytes):
        try:
            tokenizer = tokenizer.decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"the tokenizer is not the JSON of Hugging Face's tokenizers: {error}") from error
    spec = _input(program, tokens)
    fixed = spec.shape[1] if len(spec.shape) == 2 else None
    if length is None and not isinstance(fixed, int):
        raise ModelError(f"input {tokens!r} is {spec}: give length, the largest number of tokens of a text")
    if length is not None and isinstance(fixed, int) and length != fixed:
        raise ModelError(f"input {tokens!r} is {spec}, and length is {length}")
    step = Texts(
        tokenizer=tokenizer,
        tokens=tokens,
        mask=mask,
        length=length if length is not None else int(fixed or 0),
        pad=pad,
        truncate=truncate,
    )
    return program.replace(conversion=_with_input(program, name, step))


@takes(program=Program)
def take_categories(
    program: Program, name: str, vocabulary: Iterable[str], *, index: str | None = None, others: bool = True
) -> Program:
    """Have a program take words instead of their indices.

    Args:
        program: takes indices, int32.
        name: the input; clients send words by this name.
        vocabulary: the words. The n-th has the index n + 1 if there is a place for others, else n.
        index: what the input is called from now on, `NAME.index` by default.
        others: whether other words have the index 0; else they are refused.

    Raises:
        ModelError: if there is no such input, another one has the name `index`, or a word is there twice.

    >>> inputs = {"color": lx.TensorSpec(("batch",), "int32")}
    >>> program = lx.take_categories(lx.trace(lambda w, color: w[color], jnp.ones(3), inputs), "color", ["red", "blue"])
    >>> list(program.inputs), program.conversion.inputs["color"].vocabulary
    (['color.index'], ('red', 'blue'))
    """
    words = tuple(vocabulary)
    twice = next((word for word in words if words.count(word) > 1), None) if len(set(words)) < len(words) else None
    if twice is not None:
        raise ModelError(f"the vocabulary of {name!r} holds {twice!r} twice")
    index = index or f"{name}.index"
    _input(program, name)
    _refuse_taken("input", [index], program.inputs.keys() - {name})
    inputs = {index if each == name else each: found for each, found in program.inputs.items()}
    step = Categories(vocabulary=words, index=index, others=others)
    return program.replace(inputs=inputs, conversion=_with_input(program, name, step))


@takes(program=Program)
def take_images(
    program: Program,
    name: str,
    *,
    canvas: tuple[int, int] | None = None,
    fit: Literal["stretch", "crop"] = "stretch",
    mean: Sequence[float] | float = 0.0,
    scale: Sequence[float] | float = 1 / 255,
    max_pixels: int = 1 << 24,
) -> Program:
    """Have a program take JPEG and PNG files instead of arrays of images.

    The host decodes them, turns them as EXIF says, and shrinks what is larger than the canvas. Compiled code resizes
    (bilinear, with antialiasing where it shrinks), crops and normalizes: `(pixel - mean) * scale`, of pixels 0 to 255.

    Args:
        program: takes images, floats `[rows, height, width, channels]`, 1 or 3 channels, or `[rows, height, width]`.
        name: the input; clients send files by this name.
        canvas: height and width of what the host decodes to; by default twice those of the input.
        fit: `stretch` brings the whole image to the input's shape; `crop` the largest part in its middle that has it.
        mean, scale: one number, or one a channel.
        max_pixels: images of more are refused before they are decoded.

    Raises:
        ModelError: if there is no such input, or others have the names `NAME.pixels` or `NAME.size`.

    >>> inputs = {"image": lx.TensorSpec(("batch", 8, 8, 3), "float32")}
    >>> program = lx.take_images(lx.trace(lambda w, image: image.mean((1, 2)), {}, inputs), "image", canvas=(16, 16))
    >>> print(*program.inputs.values())
    uint8[batch, 16, 16, 3] int32[batch, 2]
    """
    spec = _input(program, name)
    shape = spec.shape
    channels = shape[3] if len(shape) == 4 else 1
    if len(shape) not in (3, 4) or channels not in (1, 3) or not all(isinstance(size, int) for size in shape[1:]):
        raise ModelError(f"input {name!r} is {spec}; images are [rows, height, width, 1 or 3]")
    if not jnp.issubdtype(spec.dtype, jnp.floating):
        raise ModelError(f"input {name!r} is {spec}; normalized images are floats")
    height, width = int(shape[1]), int(shape[2])
    high, wide = canvas or (2 * height, 2 * width)
    pixels, size = f"{name}.pixels", f"{name}.size"
    _refuse_taken("input", [pixels, size], program.inputs)
    inputs: dict[str, TensorSpec] = {}
    for each, found in program.inputs.items():
        if each == name:
            inputs[pixels] = TensorSpec((shape[0], high, wide, int(channels)), "uint8")
            inputs[size] = TensorSpec((shape[0], 2), "int32")
        else:
            inputs[each] = found
    at = list(program.inputs).index(name)
    center, factor = np.asarray(mean, np.float32), np.asarray(scale, np.float32)
    inner = tuple(int(each) for each in shape[1:])

    def before(fn: _Fn) -> _Fn:
        def whole(weights: Any, *args: Any) -> Any:
            image = resized(args[at], args[at + 1], (height, width), fit)
            image = ((image - center) * factor).astype(spec.dtype).reshape(-1, *inner)
            return fn(weights, *args[:at], image, *args[at + 2 :])

        return whole

    step = Images(
        pixels=pixels, size=size, height=high, width=wide, channels=int(channels), max_pixels=max_pixels
    )  # fmt: skip
    return _around(program, before, inputs=inputs, conversion=_with_input(program, name, step))


def resized(
    pixels: UInt8[Array, "n H W c"], size: Int[Array, "n 2"], shape: tuple[int, int], fit: str
) -> Float[Array, "n h w c"]:
    """Resize images of different sizes, each in the upper left corner of a canvas.

    Bilinear, the filter as wide as a pixel of the result where that is larger, so that shrinking averages.

    Args:
        pixels: the canvases.
        size: height and width of each image.
        shape: height and width of the result.
        fit: as of `take_images`.

    >>> image = jnp.zeros((1, 4, 4, 1), jnp.uint8).at[0, :2, :2, 0].set(8)
    >>> resized(image, jnp.array([[2, 2]]), (4, 4), "stretch")[0, :, :, 0].tolist()[0]
    [8.0, 8.0, 8.0, 8.0]
    """
    canvas = jnp.array(pixels.shape[1:3], jnp.int32)
    real = jnp.clip(size, 1, canvas[None]).astype(jnp.float32)
    steps = real / jnp.array(shape, jnp.float32)[None]
    if fit == "crop":
        steps = jnp.broadcast_to(steps.min(axis=1, keepdims=True), steps.shape)
    rows, columns = (_taps(real[:, i], steps[:, i], shape[i], pixels.shape[1 + i]) for i in range(2))
    image = jnp.einsum("nhH,nHWc->nhWc", rows, pixels.astype(jnp.float32), precision="highest")
    return jnp.einsum("nwW,nhWc->nhwc", columns, image, precision="highest")


def _taps(
    real: Float[Array, " n"], step: Float[Array, " n"], count: int, length: int
) -> Float[Array, "n count length"]:
    """How much each of `length` pixels, of which the first `real` exist, counts for each pixel of the result."""
    middle = (jnp.arange(count, dtype=jnp.float32) - (count - 1) / 2)[None, :, None]
    places = (real[:, None, None] - 1) / 2 + middle * step[:, None, None]
    sources = jnp.arange(length, dtype=jnp.float32)[None, None, :]
    reach = jnp.maximum(step, 1.0)[:, None, None]
    taps = jnp.maximum(0.0, 1.0 - jnp.abs(sources - jnp.clip(places, 0.0, real[:, None, None] - 1)) / reach)
    taps = jnp.where(sources < real[:, None, None], taps, 0.0)
    return taps / taps.sum(axis=2, keepdims=True)


@takes(program=Program)
def give_labels(
    program: Program,
    names: Sequence[str],
    *,
    scores: str = "output",
    label: str = "label",
    probability: str = "probability",
) -> Program:
    """Have a program give the name of the most probable class, and its probability, instead of scores.

    Args:
        program: gives scores.
        names: of the classes, in order.
        scores: the output, logits `[..., classes]`; it is not given any more.
        label, probability: what to call the new outputs.

    Raises:
        ModelError: if there is no such output, it has another number of classes, or others have the new names.

    >>> inputs = {"x": lx.TensorSpec(("batch", 2), "float32")}
    >>> program = lx.give_labels(lx.trace(lambda w, x: x, {}, inputs), ["cat", "dog"])
    >>> lx.compile(program, {"batch": (1,)}).servable()(x=[[0.0, 1.0]])["label"].tolist()
    ['dog']
    """
    if scores not in program.outputs:
        raise ModelError(f"there is no output {scores!r}; there are {', '.join(map(repr, program.outputs))}")
    spec = program.outputs[scores]
    if not spec.shape or spec.shape[-1] != len(names):
        raise ModelError(f"output {scores!r} is {spec}, and there are {len(names)} names")
    outputs = {name: found for name, found in program.outputs.items() if name != scores}
    _refuse_taken("output", [label, probability], outputs)
    outputs |= {label: TensorSpec(spec.shape[:-1], "int32"), probability: TensorSpec(spec.shape[:-1], "float32")}

    def after(fn: _Fn) -> _Fn:
        def whole(weights: Any, *args: Any) -> dict[str, Any]:
            found = name_leaves(fn(weights, *args), single="output")
            logits = found.pop(scores).astype(jnp.float32)
            best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return {**found, label: best, probability: jax.nn.softmax(logits, axis=-1).max(axis=-1)}

        return whole

    known = program.conversion or Conversion()
    conversion = Conversion(inputs=known.inputs, outputs={**known.outputs, label: Labels(names=tuple(names))})
    return _around(program, after, outputs=outputs, conversion=conversion)


def _input(program: Program, name: str) -> TensorSpec:
    if name not in program.inputs:
        raise ModelError(f"there is no input {name!r}; there are {', '.join(map(repr, program.inputs))}")
    return program.inputs[name]


def _refuse_taken(kind: str, names: Iterable[str], known: Container[str]) -> None:
    """Refuses to make an input or output of a name that another one has, which would be lost."""
    for name in names:
        if name in known:
            raise ModelError(f"the program has an {kind} {name!r} already; choose another name")


def _with_input(program: Program, name: str, step: Texts | Images | Categories) -> Conversion:
    known = program.conversion or Conversion()
    if name in known.inputs:
        raise ModelError(f"clients send {name!r} already, for other inputs of the program; choose another name")
    return Conversion(inputs={**known.inputs, name: step}, outputs=known.outputs)


def _around(program: Program, make: Callable[[_Fn], _Fn], **changes: Any) -> Program:
    """Change the function of a program, and that of its unpacked weights likewise."""
    expansion = program.expansion
    if expansion is not None:
        expansion = Expansion(expansion.expand, make(expansion.fn))
    return program.replace(fn=make(program.fn), expansion=expansion, **changes)
