"""What a client sends: one vector of changes, in float32, in codes of our own formats, or its largest entries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla.errors import FederatedError
from lepton_xla.federated.settings import Federation
from lepton_xla.quant import QTensor, quantize

if TYPE_CHECKING:
    from jaxtyping import Array, Float32

# Numbers that share a scale. Its two bytes raise int4 by 1.6 %; a scale for the whole vector would round the changes
# of a layer with small weights to zero for many rounds.
_GROUP = 256
# Codes -4 to 4 of `int3`: five of them are a number below 9^5, which two bytes hold.
_LEVELS, _PER_WORD = 9, 5
_POWERS = np.uint32(_LEVELS) ** np.arange(_PER_WORD, dtype=np.uint32)[None]

type Payload = dict[str, Any]
"""The arrays of an update by name: shapes and dtypes are those of `Codec.shapes`."""


class Layout:
    """The order of the shared weights in a vector.

    Args:
        weights: path -> array or shape; floats, sorted by path.

    >>> layout = Layout({"w": jnp.ones((2, 2)), "b": jnp.zeros(1)})
    >>> layout.length, layout.flatten({"w": jnp.ones((2, 2)), "b": jnp.zeros(1)}).tolist()
    (5, [0.0, 1.0, 1.0, 1.0, 1.0])
    """

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self.shapes = {path: tuple(weights[path].shape) for path in sorted(weights)}
        self.length = sum(math.prod(shape) for shape in self.shapes.values())

    def flatten(self, tree: Mapping[str, Any]) -> Float32[Array, " n"]:
        """The vector of these arrays, float32."""
        return jnp.concatenate([tree[path].astype(jnp.float32).reshape(-1) for path in self.shapes])

    def unflatten(self, vector: Any) -> dict[str, Any]:
        """The arrays of a vector, of NumPy or JAX as it is."""
        found: dict[str, Any] = {}
        start = 0
        for path, shape in self.shapes.items():
            size = math.prod(shape)
            found[path] = vector[start : start + size].reshape(shape)
            start += size
        return found


class Codec:
    """Makes updates of vectors, and vectors of updates.

    Args:
        settings: `updates` and `kept` count.
        length: of the vectors.

    Attributes:
        shapes: name -> shape and dtype of each array of an update.
        size_bytes: bytes of one update.
        exact: whether decoding gives what was encoded.

    >>> codec = Codec(lx.federated.Federation(updates="int8"), 1000)
    >>> codec.size_bytes, codec.exact
    (1032, False)
    >>> vector = jnp.linspace(-1, 1, 1000)
    >>> float(jnp.abs(codec.decode(codec.encode(vector)) - vector).max()) < 0.005
    True
    """

    def __init__(self, settings: Federation, length: int) -> None:
        self._format, self._length = settings.updates, length
        self.exact = self._format == "float32"
        self._kept = max(1, math.ceil(settings.kept * length)) if self._format == "top-k" else length
        self._place = jnp.dtype("uint16") if length <= 1 << 16 else jnp.dtype("uint32")
        abstract = jax.eval_shape(self.encode, jax.ShapeDtypeStruct((length,), jnp.dtype("float32")))
        self.shapes = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in abstract.items()}
        self.size_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes.values())

    def encode(self, vector: Float32[Array, " n"]) -> Payload:
        """Make an update of a float32 vector."""
        if self._format == "float32":
            return {"values": vector}
        if self._format == "int3":
            return self._words(vector)
        if self._format != "top-k":
            return self._codes(vector, self._format)
        # They are sorted by size, so numbers of about one size share a scale.
        _, places = lax.top_k(jnp.abs(vector), self._kept)
        return {"places": places.astype(self._place), **self._codes(vector[places], "int8")}

    def decode(self, payload: Mapping[str, Any]) -> Float32[Array, " n"]:
        """The vector of an update."""
        if self._format == "float32":
            return jnp.asarray(payload["values"])
        if self._format == "int3":
            return self._values_of_words(payload)
        if self._format != "top-k":
            return self._values(payload, self._format, self._length)
        places = payload["places"].astype(jnp.int32)
        return jnp.zeros(self._length, jnp.float32).at[places].set(self._values(payload, "int8", self._kept))

    def check(self, payload: Mapping[str, Any]) -> None:
        """Check an update that came from elsewhere, before anything is computed from it.

        Raises:
            FederatedError: if an array is missing, unknown, or of another shape or dtype; or a place is outside.

        >>> codec = Codec(lx.federated.Federation(), 3)
        >>> codec.check({"values": np.zeros(4, np.float32)})
        Traceback (most recent call last):
        lepton_xla.errors.FederatedError: 'values' is float32[4]; expected float32[3]
        """
        for name in (*self.shapes, *payload):
            if name not in payload or name not in self.shapes:
                raise FederatedError(f"{name[:80]!r} is {'missing' if name in self.shapes else 'not asked for'}")
            (shape, dtype), leaf = self.shapes[name], payload[name]
            if (tuple(leaf.shape), leaf.dtype) != (shape, dtype):
                raise FederatedError(f"{name!r} is {leaf.dtype}{list(leaf.shape)}; expected {dtype}{list(shape)}")
        if "places" in payload and self._kept and int(np.max(payload["places"])) >= self._length:
            raise FederatedError(f"'places' has {int(np.max(payload['places']))}, and there are {self._length} numbers")

    def _codes(self, vector: jax.Array, name: str) -> Payload:
        count = vector.shape[0]
        padded = jnp.pad(vector, (0, self._padding(count)))[:, None]
        # A searched scale would halve the error of four bits at four times the cost of a round; what is left out is
        # sent later anyway.
        made = quantize(padded, name, self._granularity(count))
        # As `_bfloat16` reads them.
        scale = made.scale if made.scale.dtype == jnp.float32 else lax.bitcast_convert_type(made.scale, jnp.uint16)
        return {"codes": made.values, "scales": scale}

    def _values(self, payload: Mapping[str, Any], name: str, count: int) -> jax.Array:
        scale = jnp.asarray(payload["scales"])
        if scale.dtype == jnp.uint16:
            scale = _bfloat16(scale)
        stored = QTensor(jnp.asarray(payload["codes"]), scale, name, count + self._padding(count))
        return stored.dequantize()[:count, 0]

    def _words(self, vector: jax.Array) -> Payload:
        groups = jnp.pad(vector, (0, -self._length % _GROUP)).reshape(-1, _GROUP)
        # Rounded up, so that no number lies beyond the last code by more than float32's rounding.
        largest = jnp.abs(groups).max(1) / (_LEVELS // 2)
        scales = ((lax.bitcast_convert_type(largest, jnp.uint32) + 0xFFFF) >> 16).astype(jnp.uint16)
        steps = _bfloat16(scales).astype(jnp.float32)[:, None]
        codes = jnp.round(groups / jnp.where(steps > 0, steps, 1)) + _LEVELS // 2
        codes = jnp.clip(codes, 0, _LEVELS - 1).astype(jnp.uint32).reshape(-1)[: self._length]
        fives = jnp.pad(codes, (0, -self._length % _PER_WORD)).reshape(-1, _PER_WORD)
        words = (fives * _POWERS).sum(1, dtype=jnp.uint32)
        return {"codes": words.astype(jnp.uint16), "scales": scales}

    def _values_of_words(self, payload: Mapping[str, Any]) -> jax.Array:
        words = jnp.asarray(payload["codes"]).astype(jnp.uint32)[:, None]
        fives = words // _POWERS % _LEVELS
        codes = fives.reshape(-1)[: self._length].astype(jnp.float32) - _LEVELS // 2
        steps = _bfloat16(jnp.asarray(payload["scales"])).astype(jnp.float32)
        return codes * jnp.repeat(steps, _GROUP)[: self._length]

    def _padding(self, count: int) -> int:
        return -count % _GROUP if count > _GROUP else 0

    def _granularity(self, count: int) -> str:
        return f"group:{_GROUP}" if count > _GROUP else "channel"


def _bfloat16(bits: jax.Array) -> jax.Array:
    """The scales that travel as their bits, uint16: NumPy files have no such dtype."""
    return lax.bitcast_convert_type(bits, jnp.bfloat16)
