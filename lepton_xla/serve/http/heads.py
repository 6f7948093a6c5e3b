"""What a request's head has to be: version, method, framing, host; and how much there may be of it.

Sources: RFC 9112, sections 2.3, 3, 6.1 and 6.3; RFC 9110, sections 7.2, 9.1 and 15.
"""

from __future__ import annotations

import re

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Head
from lepton_xla.serve.limits import Limits

SINGLE = frozenset((b"inference-header-content-length", b"content-encoding", b"content-length", b"host"))
"""Fields that may be given once only."""

# RFC 3986, section 3.2, without what comes before an @. Nothing here depends on it; what is in front may.
_HOST = re.compile(rb"[A-Za-z0-9\-._~%!$&'()*+,;=:\[\]]*")
_CODINGS = re.compile(rb"\s*,\s*")


def head_of(
    method: bytes, target: bytes, version: str, headers: dict[bytes, bytes], keep_alive: bool, limits: Limits
) -> Head:
    """The head of a request, once all of it has come.

    Args:
        method: as sent.
        target: as sent.
        version: such as "1.1".
        headers: by lower-case name.
        keep_alive: whether version and `Connection` let the connection go on.
        limits: the bounds.

    Raises:
        HTTPError: 400, 413, 501 or 505 for one after which nothing more can be read.
    """
    if not version.startswith("1."):
        raise version_refusal()
    if method == b"CONNECT":
        # What follows would be for somebody else.
        raise HTTPError(501, "this server is no proxy: CONNECT is not supported")
    old = version == "1.0"
    coding = headers.get(b"transfer-encoding")
    # With that field the framing of HTTP/1.0 is faulty, and one request is enough (RFC 9112, section 6.1).
    head = Head(method, target, headers, keep_alive and not (old and coding is not None), old)
    if coding is not None:
        head.content_length = -1
        *others, last = _CODINGS.split(coding.lower())
        if last != b"chunked" or last in others:
            raise HTTPError(400, "the body has no length: chunked must be the last transfer coding, and only once")
        if any(others):
            raise HTTPError(501, "the only transfer coding supported is chunked")
    else:
        head.content_length = int(headers.get(b"content-length", b"0"))
        if head.content_length > limits.max_body_bytes:
            raise body_refusal(limits)
    host = headers.get(b"host")
    if host is None and not old:
        raise HTTPError(400, "the Host header is missing")
    if host is not None and not _HOST.fullmatch(host):
        raise HTTPError(400, "the Host header is malformed")
    return head


def malformed(method: bytes, unknown_method: bool) -> HTTPError:
    """Why bytes that are no HTTP/1 are refused. It depends on no more than what came before the fault.

    Args:
        method: of the request, as far as known.
        unknown_method: whether the method is what cannot be read.
    """
    if method == b"PRI":
        return version_refusal()  # HTTP/2 that was not asked for (RFC 9113, section 3.4)
    if unknown_method:
        return HTTPError(501, "the request begins with no method of HTTP that this server knows")
    return HTTPError(400, "malformed HTTP request")


def version_refusal() -> HTTPError:
    """For another version than HTTP/1."""
    return HTTPError(505, "this server speaks HTTP/1.1")


def target_refusal(limits: Limits) -> HTTPError:
    """For a request target that is too long."""
    return HTTPError(414, f"the request target exceeds {limits.max_header_bytes} bytes")


def header_refusal(limits: Limits) -> HTTPError:
    """For a head that is too long."""
    return HTTPError(431, f"the request line and header fields exceed {limits.max_header_bytes} bytes")


def body_refusal(limits: Limits) -> HTTPError:
    """For a body that is too long."""
    return HTTPError(413, f"the body exceeds {limits.max_body_bytes} bytes")


def buffer_refusal() -> HTTPError:
    """For one body more than the server holds."""
    return HTTPError(503, "the server holds as many request bodies and answers as it may")
