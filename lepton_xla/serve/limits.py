"""Every bound of the server in one place; what exceeds one is refused, never buffered."""

from __future__ import annotations

import dataclasses
import math

from lepton_xla.errors import ServeError


def _limit[T](default: T, text: str) -> T:
    """A field with what `leptonx serve --help` says of it."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Hard limits on what a client may send and how long it may take.

    Each field is also an option of `leptonx serve` and an environment variable, made from this table: the name in a
    unit (`_bytes`, `_s`), the default, and the text beside it.

    Raises:
        ServeError: for a limit below one, or a time that is not positive and finite.

    >>> from lepton_xla.serve import Limits
    >>> Limits(max_headers=0)
    Traceback (most recent call last):
    lepton_xla.errors.ServeError: limit max_headers must be positive and finite, not 0
    """

    max_body_bytes: int = _limit(
        64 << 20, "Largest request body, as sent and after decompression; larger ones get 413."
    )
    max_buffered_bytes: int = _limit(
        1 << 30,
        "Bodies of all unanswered requests, those still arriving included, and all answers that are to come or not "
        "sent yet, together; more get 503.",
    )
    max_header_bytes: int = _limit(16 << 10, "Largest request line and header fields together; larger ones get 431.")
    max_headers: int = _limit(64, "Header fields of a request; more get 431.")
    max_chunks: int = _limit(65_536, "Chunks of a chunked body; more get 413.")
    max_json_depth: int = _limit(100, "Nesting of the JSON part of a request; deeper ones get 400.")
    max_tensors: int = _limit(1024, "Inputs and outputs that a request may name together; more get 400.")
    max_elements: int = _limit(1 << 28, "Elements of one input, the product of its shape; more get 400.")
    max_pipelined: int = _limit(1024, "Unanswered requests on one connection; more get 400.")
    max_connections: int = _limit(10_000, "Connections open at once; more get 503 for whatever they ask but health.")
    max_connections_per_address: int = _limit(
        10_000, "Those of them from one client address; more get the same. Leave it where a proxy is in front."
    )
    max_waiting_prompts: int = _limit(256, "Prompts of one model that wait for a slot of its cache; more get 503.")
    head_timeout_s: float = _limit(10.0, "Seconds a client may take for a TLS handshake, and for the header fields.")
    body_timeout_s: float = _limit(60.0, "Seconds a client may take to send the body.")
    idle_timeout_s: float = _limit(75.0, "Seconds a kept connection may stay without a request.")
    write_timeout_s: float = _limit(30.0, "Seconds a client may leave its answers unread.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise ServeError(f"limit {field.name} must be positive and finite, not {value!r}")
        if self.max_buffered_bytes < self.max_body_bytes:
            raise ServeError(
                f"limit max_buffered_bytes ({self.max_buffered_bytes}) is less than max_body_bytes "
                f"({self.max_body_bytes}): raise the one or lower the other"
            )
