"""The datatypes of the Open Inference Protocol and what each is in NumPy and in JSON.

Source: Open Inference Protocol v2 (`specification/protocol/inference_rest.md`, "Tensor Data Types"), with BF16 from
Triton's binary tensor data extension. Sub-byte and 8-bit float formats have no datatype on the wire.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np

from lepton_xla.errors import ServeError


@dataclasses.dataclass(frozen=True, slots=True)
class Datatype:
    """One row of the table.

    Attributes:
        name: the protocol's name, such as `FP32`.
        dtype: the little-endian NumPy dtype of its binary form; None for BYTES, whose elements vary in size.
        element: the type of one element in JSON, with its range; None where JSON cannot carry it.
    """

    name: str
    dtype: np.dtype[Any] | None
    element: Any

    @property
    def item_bytes(self) -> int:
        """Bytes of one element in binary form; 0 for BYTES."""
        return 0 if self.dtype is None else self.dtype.itemsize


def _integer(name: str, dtype: str) -> Datatype:
    info = np.iinfo(dtype)
    # msgspec's own bounds end at int64; uint64's upper half is checked when NumPy converts.
    bounds = msgspec.Meta(ge=int(info.min), le=int(info.max)) if dtype != "<u8" else msgspec.Meta(ge=0)
    return Datatype(name, np.dtype(dtype), Annotated[int, bounds])


DATATYPES: dict[str, Datatype] = {
    row.name: row
    for row in (
        Datatype("BOOL", np.dtype(np.bool_), bool | Annotated[int, msgspec.Meta(ge=0, le=1)]),
        _integer("UINT8", "<u1"),
        _integer("UINT16", "<u2"),
        _integer("UINT32", "<u4"),
        _integer("UINT64", "<u8"),
        _integer("INT8", "<i1"),
        _integer("INT16", "<i2"),
        _integer("INT32", "<i4"),
        _integer("INT64", "<i8"),
        Datatype("FP16", np.dtype("<f2"), None),
        Datatype("FP32", np.dtype("<f4"), float),
        Datatype("FP64", np.dtype("<f8"), float),
        Datatype("BF16", np.dtype(ml_dtypes.bfloat16), None),
        Datatype("BYTES", None, str),
    )
}

# The length before each element of a BYTES tensor.
_ELEMENT_BYTES = struct.Struct("<I")

_BY_DTYPE = {row.dtype.name: row for row in DATATYPES.values() if row.dtype is not None}


def datatype_of(dtype: str) -> Datatype:
    """The datatype that carries a NumPy or ml_dtypes dtype, given by name.

    Raises:
        ServeError: for a dtype the protocol cannot carry, such as `int4` or `float8_e4m3fn`.

    >>> datatype_of("float32").name
    'FP32'
    """
    found = _BY_DTYPE.get(dtype)
    if found is None:
        raise ServeError(
            f"dtype {dtype!r} has no datatype in the inference protocol; it carries {', '.join(sorted(_BY_DTYPE))}"
        )
    return found


def join_elements(elements: Iterable[bytes]) -> bytes:
    """The binary form of a BYTES tensor: each element behind its length, four bytes, little-endian.

    >>> text = join_elements([b"0.7:1"])
    >>> list(text[:4]), text[4:]
    ([5, 0, 0, 0], b'0.7:1')
    """
    return b"".join(part for element in elements for part in (_ELEMENT_BYTES.pack(len(element)), element))


def split_elements(data: bytes | memoryview) -> Iterator[bytes]:
    """The elements of the binary form of a BYTES tensor, one after the other.

    Raises:
        ValueError: when it comes to one that is cut short.

    >>> list(split_elements(join_elements([b"0.7:1", b""])))
    [b'0.7:1', b'']
    """
    at = 0
    while at < len(data):
        start = at + _ELEMENT_BYTES.size
        at = start + _ELEMENT_BYTES.unpack_from(data, at)[0] if start <= len(data) else len(data) + 1
        if at > len(data):
            raise ValueError("a BYTES tensor is cut short")
        yield bytes(data[start:at])
