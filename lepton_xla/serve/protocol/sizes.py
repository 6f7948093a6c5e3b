"""What an answer takes of memory, known from the request: so that nothing is run whose answer there is no room for."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lepton_xla.serve.protocol.classification import classes_shape
from lepton_xla.serve.protocol.signature import Signature, Tensor

# Text of a number in JSON, with a comma: what the longest double takes, and of the class of an element with its index.
_FLOAT_BYTES = 25
_CLASS_BYTES = 64
# Of a name its length or quotes, and the number of an index without one.
_LABEL_BYTES = 24


def answer_bytes(
    signature: Signature,
    sizes: Mapping[str, int],
    rows: int,
    outputs: Sequence[tuple[int, bool]],
    classes: Sequence[int],
) -> int:
    """Bytes at most of the outputs of a request as they are sent, and of the copies that are made on the way.

    Args:
        signature: the model's.
        sizes: of every symbol.
        rows: of the request.
        outputs: for each asked for, its index and whether it goes out as binary.
        classes: for each, how many of the largest elements are wanted in its place; empty where that is none.
    """
    # What a run of its own size gives is copied once; the parts of several runs are put together before that.
    copies = 2 if rows > signature.bucket_sizes[-1] else 1
    total = 0
    for position, (index, binary) in enumerate(outputs):
        tensor = signature.outputs[index]
        shape = tensor.at(sizes)
        count, elements = classes[position] if classes else 0, math.prod(shape)
        total += copies * elements * tensor.dtype.itemsize
        if count:
            total += math.prod(classes_shape(shape, count, batched=signature.batch is not None)) * _CLASS_BYTES
        elif tensor.labels:
            total += elements * (_LABEL_BYTES + _longest(tensor.labels))
        elif not binary:
            total += elements * _text_bytes(tensor)
    return total


@functools.lru_cache(256)  # a request would wait for all names of a model to be encoded
def _longest(labels: tuple[str, ...]) -> int:
    return max(len(label.encode()) for label in labels)


def _text_bytes(tensor: Tensor) -> int:
    """The longest text of an element in JSON, with a comma."""
    kind = tensor.dtype.kind
    if kind == "b":
        return len("false,")
    if kind in "iu":
        info = np.iinfo(tensor.dtype)
        return max(len(str(info.min)), len(str(info.max))) + 1
    return _FLOAT_BYTES
