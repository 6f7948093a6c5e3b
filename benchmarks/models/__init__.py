"""The models that the benchmarks measure, trained or pretrained, each with the data it is judged on."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from models.base import BenchModel, MissingError

__all__ = ["MODELS", "BenchModel", "MissingError", "load"]

# Name -> `module:function`, so that looking at one model imports nothing of the others.
MODELS = {
    "digits": "models.digits_cnn:model",
    "lenet5": "models.mnist:lenet5",
    "lenet300": "models.mnist:lenet300",
    "minilm": "models.minilm:model",
    "residual": "models.residual:model",
    "transformer": "models.transformer:model",
    "equinox": "models.equinox_cnn:model",
    "haiku": "models.haiku_mlp:model",
    "mobilenetv2": "models.mobilenet:model",
    "efficientnet-b0": "models.efficientnet:model",
}


def load(name: str, *, quick: bool = False) -> BenchModel:
    """Makes a model by name, trained unless it was before; `quick` trains and judges on little, for smoke tests.

    Raises:
        MissingError: if data or a package that it needs is not here; the message says which.
    """
    module, function = MODELS[name].split(":")
    make: Callable[..., BenchModel] = getattr(importlib.import_module(module), function)
    return make(quick=quick)
