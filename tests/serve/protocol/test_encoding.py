import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.protocol.encoding import choose, deflate, inflate

# The standard library's one-shot functions are the reference for both formats.
COMPRESS = {"gzip": gzip.compress, "deflate": zlib.compress}
DECOMPRESS = {"gzip": gzip.decompress, "deflate": zlib.decompress}
CODINGS = ["gzip", "deflate"]


def status_of(*args):
    with pytest.raises(HTTPError) as caught:
        inflate(*args)
    return caught.value.status


@pytest.mark.parametrize("coding", CODINGS)
@given(body=st.binary(max_size=2000))
def test_round_trips(coding, body):
    assert inflate(COMPRESS[coding](body), coding, 2000) == body
    assert DECOMPRESS[coding](deflate(body, coding)) == body


@pytest.mark.parametrize("coding", CODINGS)
def test_the_bound_is_exact(coding):
    assert len(inflate(COMPRESS[coding](bytes(1000)), coding, 1000)) == 1000
    assert status_of(COMPRESS[coding](bytes(1001)), coding, 1000) == 413


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_is_refused_before_it_is_inflated(coding):
    bomb = COMPRESS[coding](bytes(200 << 20))
    assert len(bomb) < 300_000
    import tracemalloc

    tracemalloc.start()
    try:
        assert status_of(bomb, coding, 1 << 20) == 413
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_gzip_members_are_joined_and_bounded_together():
    member = gzip.compress(b"a" * 600)
    assert inflate(member * 2, "gzip", 1200) == b"a" * 1200
    assert status_of(member * 2, "gzip", 1199) == 413


@pytest.mark.parametrize("coding", CODINGS)
def test_damaged_bodies_are_refused(coding):
    good = COMPRESS[coding](b"hello" * 100)
    for bad in (b"x", good[:-1], good[:10], b"\0" + good, good + b"junk"):
        assert status_of(bad, coding, 10_000) == 400


def test_a_bare_deflate_stream_is_not_what_http_calls_deflate():
    stream = zlib.compressobj(wbits=-15)
    assert status_of(stream.compress(b"abc") + stream.flush(), "deflate", 100) == 400


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "x"])
def test_other_codings_are_415(coding):
    assert status_of(b"", coding, 100) == 415


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip;q=0", None),
        ("*", "gzip"),
        ("gzip;q=0, *", "deflate"),
        ("identity", None),
        ("GZIP ; Q=0.4", "gzip"),
        ("gzip;q=nonsense", None),
    ],
)
def test_accept_encoding_is_weighed(accept, chosen):
    assert choose(accept) == chosen
