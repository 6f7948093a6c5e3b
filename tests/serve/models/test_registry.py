"""Models by name and version, and what a running server does when one takes another's place."""

import asyncio
import json
import weakref

import numpy as np
import pytest
from serve_fakes import Affine, affine_binary, affine_json, connect, exchange, raw_request, read_outputs, read_response

from lepton_xla.serve.batching.engine import Engine
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.models.registry import Registry
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.server import open_model

INFER = "/v2/models/affine/infer"
X, N = np.ones((1, 4), np.float32), np.array([5], np.int32)


class Handle:
    def __init__(self, name, version):
        self.signature = signature_of(named(name, version))


def named(name, version):
    servable = Affine()
    servable.name, servable.version = name, version
    return servable


class Negative(Affine):
    """`Affine` with the sign of `y` turned."""

    def run(self, sizes, arrays):
        y, twice = super().run(sizes, arrays)
        return [-y, twice]


def put(server, servable):
    """Has a running server answer with a model; gives a weak reference to it."""

    async def on_loop():
        engine = Engine(servable, signature_of(servable))
        model = open_model(
            engine, engine.warm_up(), signature_of(servable), server.options, server.metrics, server.devices[0]
        )
        server.models.put(model)
        return weakref.ref(model)

    return asyncio.run_coroutine_threadsafe(on_loop(), server._loop).result(20)


def y_of(response):
    status, headers, body = response
    assert status == 200, body
    return read_outputs(headers, body)["y"]


def test_find():
    one, two, other = Handle("a", "1"), Handle("a", "2"), Handle("b", "1")
    models = Registry(one, two, other)
    assert list(models) == [one, two, other]
    assert models.versions("a") == ["1", "2"]
    assert (models.find("a", "1"), models.find("a", "2"), models.find("b")) == (one, two, other)
    assert models.find("a") is two
    assert models.names() == ["a", "b"]
    for name, version, says in (
        ("c", None, "Request for unknown model: 'c' is not found"),
        ("c\n", None, "Request for unknown model"),
        ("b", "2", "Request for unknown model: 'b' version '2' is not found"),
        ("b", "2\n", "Request for unknown model: 'b' has no such version"),
    ):
        with pytest.raises(HTTPError) as caught:
            models.find(name, version)
        assert (caught.value.status, caught.value.message) == (404, says)


def test_a_change_is_another_generation_and_the_greatest_answers_where_no_version_is_named():
    ten = Handle("a", "10")
    models = Registry(Handle("a", "first"), Handle("a", "9"), ten, Handle("a", "2"))
    before = models.generation
    again = Handle("a", "2")
    models.put(again)
    assert models.generation != before
    assert models.find("a", "2") is again
    assert models.find("a") is ten
    assert models.versions("a") == ["first", "2", "9", "10"]
    assert models.remove(ten)
    assert not models.remove(ten)
    assert models.find("a").signature.version == "9"


def test_labels_stand_on_loaded_versions_and_stable_answers_where_no_version_is_named():
    one, two = Handle("a", "1"), Handle("a", "2")
    models = Registry(one, two)
    models.label("a", {"stable": "1", "canary": "2", "next": "3"})
    assert models.labels("a") == models.labels() == {"stable": "1", "canary": "2"}
    assert (models.find("a"), models.find("a", label="canary"), models.find("a", "2")) == (one, two, two)
    for label, says in (("next", "Request for unknown model: 'a' label 'next' is not found"), ("x\n", "no such label")):
        with pytest.raises(HTTPError) as caught:
            models.find("a", label=label)
        assert caught.value.status == 404
        assert says in caught.value.message
    before = models.generation
    models.label("a", {"stable": "1", "canary": "2"})
    assert models.generation == before
    models.remove(one)
    assert models.labels("a") == {"canary": "2"}
    assert models.find("a") is two
    models.remove(two)
    assert (models.names(), models.labels()) == ([], {})
    models.label("a", {"stable": "1"})
    assert models.labels() == {}


def test_the_next_request_of_a_kept_connection_gets_the_new_model_and_nothing_keeps_the_old_one(make_server):
    server = make_server(Affine())
    body, headers = affine_binary(X, N)
    ways = [  # each kept with the head in another way
        raw_request("POST", INFER, body, headers),
        raw_request("POST", INFER, affine_json(X, N)),
        raw_request("POST", INFER.replace("/infer", "/versions/3/infer"), body, headers),
        raw_request("GET", "/v2/models/affine"),
    ]
    first = put(server, Affine())  # that which the server was started with is kept by it
    old = first().scheduler
    with connect(server) as sock, connect(server) as idle:
        for request in ways[:3] * 2:
            sock.sendall(request)
            np.testing.assert_array_equal(y_of(read_response(sock)), 2 * X + 5)
        for request in ways:  # heads that nobody asks for again
            idle.sendall(request)
            assert read_response(idle)[0] == 200
        put(server, Negative())
        old.stop()
        del old
        assert first() is None
        for request in ways[:3] * 2:
            sock.sendall(request)
            np.testing.assert_array_equal(y_of(read_response(sock)), -(2 * X + 5))


def test_what_is_under_way_ends_where_it_began(make_server, affine):
    server = make_server(affine)
    request = raw_request("POST", INFER, affine_json(X, N))
    with connect(server) as sock:
        affine.gate.clear()
        affine.running.clear()
        sock.sendall(request)
        assert affine.running.wait(5)
        put(server, Negative())
        sock.sendall(request)
        affine.gate.set()
        np.testing.assert_array_equal(y_of(read_response(sock)), 2 * X + 5)
        np.testing.assert_array_equal(y_of(read_response(sock)), -(2 * X + 5))


def test_several_models_answer_side_by_side(make_server):
    server = make_server(Affine())
    missing = "/v2/models/other/infer"
    with connect(server) as sock:
        sock.sendall(raw_request("POST", missing, affine_json(X, N)))
        assert read_response(sock)[0] == 404
        sock.sendall(raw_request("POST", INFER, affine_json(X, N)))
        assert read_response(sock)[0] == 200
        other = Negative()
        other.name, other.version = "other", "7"
        put(server, other)
        newer = Negative()
        newer.version = "4"
        put(server, newer)
        answers = {}
        for path in (missing, INFER, INFER.replace("/infer", "/versions/3/infer")):
            sock.sendall(raw_request("POST", path, affine_json(X, N)))
            status, headers, body = read_response(sock)
            said = json.loads(body)
            answers[path] = said["model_name"], said["model_version"], y_of((status, headers, body))[0, 0]
        assert list(answers.values()) == [("other", "7", -7), ("affine", "4", -7), ("affine", "3", 7)]
    index = json.loads(exchange(server, "POST", "/v2/repository/index")[2])
    assert [(each["name"], each["version"], each["state"]) for each in index] == [
        ("affine", "3", "READY"), ("affine", "4", "READY"), ("other", "7", "READY"),
    ]  # fmt: skip
    assert json.loads(exchange(server, "GET", "/v2/models/affine")[2])["versions"] == ["3", "4"]
    assert exchange(server, "GET", "/v2/models/other/ready")[0] == 200
    assert exchange(server, "GET", "/v2/models/other/versions/3")[0] == 404
    statistics = json.loads(exchange(server, "GET", "/v2/models/stats")[2])["model_stats"]
    assert [each["name"] for each in statistics] == ["affine", "affine", "other"]
