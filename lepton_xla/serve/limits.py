"""Every bound of the server in one place; what exceeds one is refused, never buffered."""

from __future__ import annotations

import dataclasses

from lepton_xla.errors import ServeError


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Hard limits on what a client may send and how long it may take.

    Attributes:
        max_body_bytes: largest request body, both as sent and after decompression.
        max_header_bytes: request line and header fields together.
        max_headers: number of header fields.
        max_chunks: chunks of one chunked body (a body of a million one-byte chunks costs more than it carries).
        max_json_depth: nesting of the JSON part of a request.
        max_pipelined: unanswered requests on one connection.
        max_connections: connections open at once; more are answered 503 and closed.
        head_timeout_s: from the first byte of a request to the end of its header fields.
        body_timeout_s: from the end of the header fields to the end of the body.
        idle_timeout_s: a keep-alive connection without a request.
        write_timeout_s: a client that does not read its answers.

    Raises:
        ServeError: for a limit below one, or a time that is not positive.
    """

    max_body_bytes: int = 64 << 20
    max_header_bytes: int = 16 << 10
    max_headers: int = 64
    max_chunks: int = 65_536
    max_json_depth: int = 100
    max_pipelined: int = 1024
    max_connections: int = 10_000
    head_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 75.0
    write_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ServeError(f"limit {field.name} must be positive, not {value!r}")
