"""TensorFlow's SavedModel and LiteRT's (TensorFlow Lite's) file. Needs the extra `tensorflow`."""

from __future__ import annotations

import pathlib
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from lepton_xla.compiler.portable_model import PortableModel
from lepton_xla.environment.extras import Needs
from lepton_xla.errors import UnsupportedError, first_line

_SIGNATURE = "serving_default"
# How TensorFlow calls a module of StableHLO: the version of the calling convention that JAX 0.11 and 0.12 write.
_CALL_VERSION = 10


def write_saved_model(model: PortableModel, path: pathlib.Path) -> Any:
    """Write a SavedModel whose only signature calls the program, with the weights as variables.

    Returns:
        The function that runs it.
    """
    tf = _tensorflow()
    _save(tf, model, path)

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        signature = tf.saved_model.load(str(path)).signatures[_SIGNATURE]
        try:
            outputs = signature(**{name: tf.constant(array) for name, array in inputs.items()})
        except tf.errors.OpError as error:
            name = model.servable.name
            raise UnsupportedError(f"saved-model: TensorFlow cannot run {name!r}: {first_line(error)}") from error
        return {name: np.asarray(array.numpy()) for name, array in outputs.items()}

    return run


def write_tflite(model: PortableModel, path: pathlib.Path) -> Any:
    """Write a file of LiteRT's own operations.

    Returns:
        The function that runs it.
    """
    tf = _tensorflow()
    with tempfile.TemporaryDirectory() as folder:
        _save(tf, model, pathlib.Path(folder))
        try:
            converted = tf.lite.TFLiteConverter.from_saved_model(folder).convert()
        except Exception as error:  # the converter's own, and ValueError
            raise UnsupportedError(f"tflite: LiteRT cannot hold {model.servable.name!r}: {_said(error)}") from error
    path.write_bytes(converted)

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            with warnings.catch_warnings():  # it is to become a package of its own, which TensorFlow does not bring
                warnings.simplefilter("ignore")
                runner = tf.lite.Interpreter(model_path=str(path)).get_signature_runner(_SIGNATURE)
            return {name: np.asarray(array) for name, array in runner(**inputs).items()}
        except (RuntimeError, ValueError) as error:
            raise UnsupportedError(f"tflite: LiteRT cannot run {model.servable.name!r}: {_said(error)}") from error

    return run


def _tensorflow() -> Any:
    with Needs("tensorflow", "an export to saved-model or tflite"):
        import tensorflow  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
    return tensorflow


def _save(tf: Any, model: PortableModel, path: pathlib.Path) -> None:
    from tensorflow.compiler.tf2xla.python import xla  # pyright: ignore[reportMissingImports]

    servable, module = model.servable, model.module()
    shapes = {
        name: [size if isinstance(size, int) else None for size in s.shape] for name, s in servable.inputs.items()
    }
    holder = tf.Module()
    try:
        holder.weights = [tf.Variable(array, trainable=False) for array in model.weights]
        taken = [tf.TensorSpec(shapes[name], spec.dtype, name=name) for name, spec in servable.inputs.items()]
        returned = [tf.as_dtype(spec.dtype) for spec in servable.outputs.values()]
    except (TypeError, ValueError) as error:
        raise UnsupportedError(f"TensorFlow cannot hold {servable.name!r}: {first_line(error)}") from error
    sizes = [[size if isinstance(size, int) else None for size in spec.shape] for spec in servable.outputs.values()]

    def call(*inputs: Any) -> dict[str, Any]:
        outputs = xla.call_module(
            [*(weight.value() for weight in holder.weights), *inputs],
            version=_CALL_VERSION, module=module, Tout=returned, Sout=sizes, platforms=["CPU"],
        )  # fmt: skip
        return dict(zip(servable.outputs, outputs, strict=True))

    holder.call = tf.function(call, input_signature=taken, autograph=False)
    tf.saved_model.save(holder, str(path), signatures={_SIGNATURE: holder.call})


def _said(error: BaseException) -> str:
    """What the converter says is wrong: the part after the place in a program's source."""
    return first_line(error).rpartition("error: ")[2]
