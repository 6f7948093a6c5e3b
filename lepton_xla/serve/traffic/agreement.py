"""Whether two versions answer alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lepton_xla.dtypes import classes_of
from lepton_xla.serve.monitor.monitor import judged_output
from lepton_xla.serve.protocol.signature import Signature
from lepton_xla.serve.protocol.wire import RequestSpec

# Of floats, how far apart equal ones may be: as a share of the larger, and of the largest of all.
_RELATIVE = 0.02
_ABSOLUTE = 1e-3


def same_rows(signature: Signature, spec: RequestSpec, ones: Sequence[bytes], others: Sequence[bytes]) -> int:
    """How many rows two answers agree on.

    Where the model has an output with classes and it was asked for, a row agrees if its class does. Else floats agree
    if they differ by at most 2 %, and everything else if it is equal.

    Args:
        signature: of both versions.
        spec: of the request.
        ones, others: the bytes of the outputs that it asked for.
    """
    judged = judged_output(signature)
    asked = [index for index, _ in spec.outputs]
    same = np.ones(spec.rows, bool)
    for index, one, other in zip(asked, ones, others, strict=True):
        if judged in asked and index != judged:
            continue
        dtype = signature.outputs[index].dtype
        left, right = (np.frombuffer(each, dtype).reshape(spec.rows, -1) for each in (one, other))
        if index == judged:
            same &= classes_of(left) == classes_of(right)
        elif dtype.kind in "biu":
            same &= (left == right).all(axis=1)
        else:
            left, right = left.astype(np.float64), right.astype(np.float64)
            scale = max(float(np.abs(left).max(initial=0.0, where=np.isfinite(left))), 1e-30)
            close = np.isclose(left, right, rtol=_RELATIVE, atol=_ABSOLUTE * scale, equal_nan=True)
            same &= close.all(axis=1)
    return int(same.sum())
