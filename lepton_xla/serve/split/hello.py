"""What the engine says to a front-end first: the model it runs."""

from __future__ import annotations

import msgspec

from lepton_xla.serve.protocol.signature import Signature, Tensor, signature_of


class Spec(msgspec.Struct, frozen=True):
    """Shape and dtype of an input or output."""

    shape: tuple[int | str, ...]
    dtype: str


class Hello(msgspec.Struct, frozen=True):
    """The model, and the bounds that a front-end has to know.

    Attributes:
        name, version, inputs, outputs, buckets: as of a servable, the name as on the wire.
        max_rows: most rows of one request.
    """

    name: str
    version: str
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    buckets: dict[str, tuple[int, ...]]
    max_rows: int

    @property
    def signature(self) -> Signature:
        """The model's."""
        return signature_of(self, self.name)


END = b"\n"
"""What ends a hello, which may take more than one packet."""

_DECODER = msgspec.json.Decoder(Hello)


def encode(signature: Signature, max_rows: int) -> bytes:
    """The hello of an engine."""

    def specs(tensors: tuple[Tensor, ...]) -> dict[str, Spec]:
        return {tensor.name: Spec(tensor.shape, tensor.dtype.name) for tensor in tensors}

    said = Hello(
        signature.name,
        signature.version,
        specs(signature.inputs),
        specs(signature.outputs),
        signature.buckets,
        max_rows,
    )
    return msgspec.json.encode(said) + END


def decode(packet: bytes) -> Hello:
    """What an engine said.

    Raises:
        ValueError: if it is no hello.
    """
    return _DECODER.decode(packet)
