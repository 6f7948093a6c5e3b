"""Bytes of any kind through the whole way of a request: a short run of `serve_fuzz.py`, and what it found before."""

import pytest
from serve_fuzz import SEEDS, Fuzzed, run_random, split


def test_what_the_changes_start_from_is_good():
    fuzzed = Fuzzed()
    for data in SEEDS:
        fuzzed.check(data, [7, 100, 300])
        written, _ = fuzzed.answers([data])
        assert {head[:12] for head, _ in split(written)} == {b"HTTP/1.1 200"}


@pytest.mark.parametrize("seconds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_changed_requests_break_nothing(seconds):
    assert run_random(seconds, seed=0) > 10 * seconds


POST = b"POST /v2/models/affine/infer HTTP/1.1\r\nHost: a\r\n"

TRACE = b"00-%s-%s-01" % (b"ab" * 16, b"cd" * 8)


@pytest.mark.parametrize(("data", "cuts"), [
    # HTTP/0.9, which llhttp gives up without an exception of its own.
    (b"POST /v2/m\nContent-Length: 93\r\n\r\n", []),
    # A field given twice, told by the line after it; without its traceparent the error comes first.
    (POST + b"Content-Length: 5\r\nHost: b\r\ntraceparent: 00-a\r\n\"x\": 5\r\n\r\nhello", [7, 14]),
    # A second traceparent that is not taken out, because it is not of printable characters.
    (b"GET /v2 HTTP/1.1\r\nHost: a\r\ntraceparent: %s\r\ntraceparent: \xd7\r\n\r\n" % TRACE, [7]),
    # Blank lines before a request, alone and with one that is remembered.
    (b"\r\n\r\nGET /v2 HTTP/1.1\r\nHost: a\r\n\r\n" * 2, [2, 40]),
    # A remembered head whose body is shorter, or longer, than it says.
    (POST + b"Content-Length: 2\r\n\r\n{}" + POST + b"Content-Length: 2\r\n\r\n{" + b"GET / HTTP/1.1\r\n\r\n", [80]),
], ids=range(5))  # fmt: skip
def test_what_was_found_stays_right(data, cuts):
    Fuzzed().check(data, cuts)
