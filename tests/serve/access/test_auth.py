"""Tokens: who may ask for what, decided once a head and still true for the next request with that head."""

import datetime
import hashlib
import json
import logging
import math
import os
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_fakes import Affine, affine_binary, connect, exchange, raw_request, read_response

from lepton_xla.errors import ServeError
from lepton_xla.serve import Options, Server
from lepton_xla.serve.access.auth import Grant, Guard
from lepton_xla.serve.access.tokens import Token, create_token, read_tokens, revoke_token
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange, Head

INFER = "/v2/models/affine/infer"
X = np.ones((1, 4), np.float32)
OPEN = frozenset((b"/v2/health/live", b"/v2/health/ready"))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tokens.jsonl"


@pytest.fixture
def secrets(file):
    """A token of each scope, and one of all."""
    made = {scope: create_token(file, scope, [scope]) for scope in ("infer", "read", "admin")}
    return made | {"all": create_token(file, "all", ["infer", "read", "admin"])}


@pytest.fixture
def guarded(make_server, file, secrets):
    return make_server(Affine(), token_file=file)


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def infer_bytes(secret, n=1):
    body, fields = affine_binary(X, [n])
    return raw_request("POST", INFER, body, fields | bearer(secret))


def ask(server, secret, method="POST", path=INFER):
    body, fields = affine_binary(X, [1]) if path.endswith("/infer") else (b"", {})
    return exchange(server, method, path, body, fields | bearer(secret))


def head(secret=None, target=b"/v2", **headers):
    fields = {b"host": b"test"} | {key.encode(): value for key, value in headers.items()}
    if secret is not None:
        fields[b"authorization"] = b"Bearer " + secret.encode()
    return Head(b"GET", target, fields, keep_alive=True, old=False)


ROUTES = [
    ("GET", "/v2", "read"),
    ("GET", "/v2/", "read"),
    ("GET", "/v2/models/affine", "read"),
    ("GET", "/v2/models/affine/ready", "read"),
    ("GET", "/v2/models/affine/config", "read"),
    ("GET", "/v2/models/affine/stats", "read"),
    ("GET", "/v2/models/stats", "read"),
    ("GET", "/v2/models/affine/versions/3", "read"),
    ("GET", "/v2/models/affine/versions/3/ready", "read"),
    ("POST", "/v2/repository/index", "read"),
    ("GET", "/metrics", "read"),
    ("POST", INFER, "infer"),
    ("POST", "/v2/models/affine/versions/3/infer", "infer"),
]


@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
def test_a_route_takes_its_scope_and_no_other(guarded, secrets, method, path, scope):
    status, headers, body = exchange(guarded, method, path)
    assert status == 401
    assert headers["www-authenticate"].startswith("Bearer")
    assert set(json.loads(body)) == {"error"}
    for name, secret in secrets.items():
        status, headers, body = ask(guarded, secret, method, path)
        if name in (scope, "all"):
            assert status == 200, body
        else:
            assert status == 403
            assert f'scope="{scope}"' in headers["www-authenticate"]


def test_health_is_open_to_all(guarded):
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/health/live?x=1"):
        assert exchange(guarded, "GET", path)[0] == 200
        assert exchange(guarded, "GET", path, headers={"Authorization": "Bearer nonsense"})[0] == 200


@pytest.mark.parametrize("path", ["/", "/nothing", "/v2/models/other", "/v2/nothing", "/docs", "/favicon.ico"])
def test_without_a_token_nobody_learns_which_paths_exist(guarded, secrets, path):
    known = exchange(guarded, "GET", "/v2/models/affine")
    assert exchange(guarded, "GET", path) == known
    assert known[0] == 401
    assert ask(guarded, secrets["all"], "GET", path)[0] == 404


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer ", "Bearer x", "Basic {0}", "{0}", "Bearer {0}x", "Bearer {0}, Bearer {0}", "Bearer {0} {0}",
     "Bearer {0}=", "Token {0}", "Bearer\t{0}", "Bearer " + "a" * 600, "Bearer \xff", "Bearer {1}"],
)  # fmt: skip
def test_credentials_that_are_none_are_refused(guarded, secrets, given):
    given = given.format(secrets["all"], hashlib.sha256(secrets["all"].encode()).hexdigest())
    status, headers, body = exchange(guarded, "GET", "/v2", headers={"Authorization": given})
    assert status == 401
    assert headers["www-authenticate"].startswith("Bearer")
    assert secrets["all"] not in body.decode()


def test_two_authorization_fields_are_refused(guarded, secrets):
    line = f"Authorization: Bearer {secrets['all']}\r\n"
    with connect(guarded) as sock:
        sock.sendall(f"GET /v2 HTTP/1.1\r\nHost: a\r\n{line}{line}\r\n".encode())
        assert read_response(sock)[0] == 401


def test_the_scheme_may_be_written_in_any_case(guarded, secrets):
    for scheme in ("bearer", "BEARER"):
        assert exchange(guarded, "GET", "/v2", headers={"Authorization": f"{scheme} {secrets['read']}"})[0] == 200


def test_a_body_is_not_read_before_the_token(guarded):
    with connect(guarded) as sock:
        sock.sendall(raw_request("POST", INFER, b"", {"Content-Length": "1000000", "Expect": "100-continue"}))
        status, headers, _ = read_response(sock)
        assert (status, headers["connection"]) == (401, "close")
    with connect(guarded) as sock:
        sock.sendall(raw_request("POST", INFER, b"", {"Transfer-Encoding": "chunked"}))
        assert read_response(sock)[0] == 401


def test_a_connection_is_nobodys(guarded, secrets):
    """Each request is judged by its own head, also where its path was just let in for another."""
    with connect(guarded) as sock:
        for secret, status in ((secrets["infer"], 200), (secrets["read"], 403)) * 3 + (("x" * 43, 401),):
            for _ in range(2 if status != 401 else 1):
                sock.sendall(infer_bytes(secret))
                assert read_response(sock)[0] == status
        assert sock.recv(1) == b""


def wait_until(true, seconds=5):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_revoked_token_ends_on_an_open_connection_and_a_new_one_works(guarded, secrets, file):
    with connect(guarded) as sock:

        def status(secret):
            sock.sendall(raw_request("GET", "/v2", b"", bearer(secret)))
            return read_response(sock)[0]

        assert status(secrets["read"]) == status(secrets["read"]) == 200
        revoke_token(file, "read")
        wait_until(lambda: status(secrets["read"]) == 401)
        assert status(secrets["all"]) == 200
        new = create_token(file, "read", ["read"])
        wait_until(lambda: status(new) == 200)
        assert status(secrets["read"]) == 401


def test_a_scope_taken_away_is_gone_for_heads_that_were_let_in(guarded, secrets, file):
    assert ask(guarded, secrets["all"])[0] == 200
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    next(line for line in lines if line["name"] == "all")["scopes"] = ["read"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wait_until(lambda: ask(guarded, secrets["all"])[0] == 403)


@pytest.mark.parametrize("damage", ["{", "not json", '{"name": "x"}', "missing", "writable"])
def test_a_broken_file_keeps_the_tokens_and_says_so(guarded, secrets, file, caplog, damage):
    before = file.read_bytes()
    with caplog.at_level(logging.ERROR, "lepton_xla.serve"):
        if damage == "missing":
            file.unlink()
        elif damage == "writable":
            file.chmod(0o666)
        else:
            file.write_text(damage)
        wait_until(lambda: caplog.records)
        if damage == "missing":
            time.sleep(1.2)
    assert len(caplog.records) == 1  # once, not at every look
    assert "stays in use" in caplog.text
    assert ask(guarded, secrets["read"], "GET", "/v2")[0] == 200
    assert exchange(guarded, "GET", "/v2")[0] == 401
    file.write_bytes(before)
    file.chmod(0o600)
    revoke_token(file, "read")
    wait_until(lambda: ask(guarded, secrets["read"], "GET", "/v2")[0] == 401)


def test_an_empty_file_lets_nobody_in(make_server, file, secrets):
    file.write_text("")
    server = make_server(Affine(), token_file=file)
    assert ask(server, secrets["all"])[0] == 401
    assert exchange(server, "GET", "/v2/health/ready")[0] == 200


def test_an_expired_token_ends_between_two_requests_with_one_head(make_server, file):
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
    secret = create_token(file, "short", ["read"], expires=end)
    server = make_server(Affine(), token_file=file)
    data = raw_request("GET", "/v2", b"", bearer(secret))
    with connect(server) as sock:
        statuses = []
        while datetime.datetime.now(datetime.UTC) < end + datetime.timedelta(seconds=0.1):
            sock.sendall(data)
            statuses.append(read_response(sock)[0])
            time.sleep(0.05)
        assert statuses[0] == 200
        assert statuses[-1] == 401
        assert sorted(statuses) == statuses


def test_a_rate_limit_gives_429_and_when_to_come_back(make_server, file):
    limited = create_token(file, "limited", ["read"], requests_per_s=2, burst=3)
    free = create_token(file, "free", ["read"])
    server = make_server(Affine(), token_file=file)
    data = raw_request("GET", "/v2", b"", bearer(limited))
    with connect(server) as sock:
        statuses = []
        for _ in range(6):
            sock.sendall(data)
            status, headers, _ = read_response(sock)
            statuses.append(status)
        assert statuses == [200] * 3 + [429] * 3
        assert headers["retry-after"] == "1"
        # Another head of the same token is the same bucket.
        assert ask(server, limited, "GET", "/v2/models/affine")[0] == 429
        assert ask(server, free, "GET", "/v2")[0] == 200
        time.sleep(0.6)
        sock.sendall(data)
        assert read_response(sock)[0] == 200


def test_a_reload_does_not_fill_the_bucket(make_server, file):
    limited = create_token(file, "limited", ["read"], requests_per_s=0.001, burst=2)
    server = make_server(Affine(), token_file=file)
    assert [ask(server, limited, "GET", "/v2")[0] for _ in range(3)] == [200, 200, 429]
    other = create_token(file, "other", ["read"])
    wait_until(lambda: ask(server, other, "GET", "/v2")[0] == 200)
    status, headers, _ = ask(server, limited, "GET", "/v2")
    assert status == 429
    assert 900 < int(headers["retry-after"]) <= 1000


def token_of(rate=None, burst=None):
    return Token("t", "0" * 64, ["read"], None, rate, burst)


@given(
    rate=st.sampled_from([0.5, 1.0, 3.0, 10.0, 1000.0]),
    burst=st.integers(1, 20),
    gaps=st.lists(st.floats(0, 3), min_size=1, max_size=200),
)
def test_the_bucket_is_the_bucket_of_the_textbook(rate, burst, gaps):
    """Against tokens that are counted: `burst` at first, `rate` more each second up to `burst`, one a request."""
    grant, level, now = Grant(token_of(rate, burst), None), Fraction(burst), Fraction(0)
    for gap in gaps:
        step = Fraction(round(gap * 64), 64)
        now += step
        level = min(Fraction(burst), level + step * Fraction(rate))
        if level >= 1:
            grant.admit(float(now))
            level -= 1
        else:
            with pytest.raises(HTTPError) as caught:
                grant.admit(float(now))
            wait = max(1, math.ceil((1 - level) / Fraction(rate)))
            assert (caught.value.status, caught.value.headers) == (429, (f"Retry-After: {wait}",))


def test_a_burst_left_out_is_one_seconds_worth():
    for rate, burst in ((10.0, 10), (0.1, 1), (2.6, 3)):
        grant = Grant(token_of(rate), None)
        for _ in range(burst):
            grant.admit(5.0)
        with pytest.raises(HTTPError):
            grant.admit(5.0)


def test_a_grant_without_a_limit_is_good_for_any_number():
    grant = Grant(token_of(), None)
    for _ in range(1000):
        grant.admit(0.0)


def test_a_token_is_found_by_its_digest_and_confirmed_in_constant_time(file, secrets, monkeypatch):
    guard = Guard(file, OPEN)
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or False)
    with pytest.raises(HTTPError):
        guard.authenticate(head(secrets["read"]))
    digest = hashlib.sha256(secrets["read"].encode()).digest()
    assert compared == [(digest, digest)]


def test_a_route_of_no_scope_takes_a_token_too(file, secrets):
    """Fail closed: a path that is open but whose route is not, or a scope nobody has, is refused."""
    guard = Guard(file, OPEN)
    with pytest.raises(HTTPError) as caught:
        guard.protect(guard.authenticate(head(target=b"/v2/health/live")), "read", print, print)
    assert caught.value.status == 401
    with pytest.raises(HTTPError) as caught:
        guard.protect(guard.authenticate(head(secrets["all"])), "unheard of", print, print)
    assert caught.value.status == 403


def test_a_request_that_was_let_in_costs_under_a_microsecond(file):
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    secret = create_token(file, "t", ["read"], expires=expires, requests_per_s=1e6, burst=1_000_000_000)
    guard = Guard(file, OPEN)
    ours = head(secret)
    asked = Exchange(None, ours, b"", 0.0)
    route = guard.protect(guard.authenticate(ours), "read", lambda _: None, None)
    best = min(timeit.repeat(lambda: route(asked), number=2000, repeat=20)) / 2000
    assert best < 3e-6  # 0.3 us on an idle core; this machine may be busy


LINE = {"name": "t", "sha256": "0" * 64, "scopes": ["read"]}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"name": "a b"}, "name"),
        ({"name": "a\n"}, "name"),
        ({"name": ""}, "name"),
        ({"sha256": "0" * 63}, "sha256"),
        ({"sha256": "G" * 64}, "sha256"),
        ({"sha256": "0" * 64 + "\n"}, "sha256"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "root"),
        ({"scopes": "read"}, "scopes"),
        ({"expires": "2030-01-01T00:00:00"}, "timezone"),
        ({"expires": 5}, "expires"),
        ({"expires": "never"}, "expires"),
        ({"requests_per_s": 0}, "requests_per_s"),
        ({"requests_per_s": -1}, "requests_per_s"),
        ({"requests_per_s": "5"}, "requests_per_s"),
        ({"burst": 0}, "burst"),
        ({"expire": "2030-01-01T00:00:00Z"}, "expire"),
    ],
)
def test_a_line_that_is_no_token_is_named(file, changes, part):
    """A misspelled key above all: taken for absent it would be a token without an end."""
    file.write_text(json.dumps(LINE) + "\n\n" + json.dumps(LINE | {"name": "u"} | changes) + "\n")
    file.chmod(0o600)
    with pytest.raises(ServeError, match="line 3") as caught:
        read_tokens(file)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("second", "part"), [({"sha256": "1" * 64}, "name"), ({"name": "u"}, "sha256")])
def test_a_name_or_a_digest_given_twice_is_refused(file, second, part):
    file.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | second))
    file.chmod(0o600)
    with pytest.raises(ServeError, match=f"the {part} of token .* twice"):
        read_tokens(file)


def test_a_file_that_others_may_write_is_refused_and_one_they_may_read_is_warned_of(file, secrets, caplog):
    file.chmod(0o640)
    assert len(read_tokens(file)) == 4
    assert "may be read by others (mode 0640)" in caplog.text
    for mode in (0o620, 0o602):
        file.chmod(mode)
        with pytest.raises(ServeError, match="chmod 600"):
            read_tokens(file)


def test_a_server_without_its_token_file_does_not_start(tmp_path):
    with pytest.raises(ServeError, match="token file"):
        Server(Affine(), Options(port=0, token_file=tmp_path / "nothing"))


def test_two_writers_lose_nothing(file):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: create_token(file, f"t{n}", ["read"]), range(40)))
    assert {token.name for token in read_tokens(file)} == {f"t{n}" for n in range(40)}


def test_a_write_that_fails_leaves_the_file(file, secrets, monkeypatch):
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ServeError, match="No space left"):
        create_token(file, "more", ["read"])
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
