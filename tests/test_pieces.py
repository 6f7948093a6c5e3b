"""Work in pieces: when it rests, that it finds the same, and that a server's loader rests while requests come."""

import hashlib
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla import pieces
from lepton_xla.errors import ArtifactError
from lepton_xla.serve.loader import ArtifactLoader
from lepton_xla.serve.models.changes import Source

SIDE = 512  # of a weight of four pieces
WEIGHT = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    weights = {"w": WEIGHT}
    program = lx.trace(lambda w, x: jnp.dot(x, w["w"]), weights, {"x": lx.TensorSpec(("batch", SIDE), "float32")})
    path = tmp_path_factory.mktemp("pieces") / "dense.lepton"
    lx.compile(program, {"batch": (1,)}, name="dense").save(path)
    return path


def test_reading_hashing_and_looking_at_weights_rests_after_every_quarter_of_a_mebibyte(artifact):
    threads = []
    with pieces.resting(lambda: threads.append(threading.get_ident())):
        model = lx.load(artifact, check=True)
    found = model(x=np.ones((1, SIDE), np.float32))["output"]
    np.testing.assert_allclose(found[0], WEIGHT.astype(np.float64).sum(axis=0), atol=1e-3)
    assert len(threads) >= 3 * SIDE * SIDE * 4 // pieces.PIECE_BYTES
    before = len(threads)
    lx.load(artifact, check=True)
    assert len(threads) == before


def test_pieces_on_several_threads_rest_on_each(monkeypatch):
    monkeypatch.setattr(pieces, "usable_cores", lambda: 8)
    threads = []
    with pieces.resting(lambda: threads.append(threading.current_thread().name)), pieces.executor(8, "piece") as pool:
        list(pool.map(lambda _: pieces.rest(), range(8)))
    assert len(threads) == 8
    assert {name.partition("_")[0] for name in threads} == {"piece"}


@pytest.mark.parametrize("size", [0, 1, pieces.PIECE_BYTES, pieces.PIECE_BYTES + 1])
def test_digests_in_pieces_are_those_of_the_whole(size):
    data = np.random.default_rng(size).bytes(size)
    with pieces.resting(lambda: None):
        assert pieces.sha256(data) == hashlib.sha256(data).hexdigest()


def test_a_weight_whose_last_piece_is_not_a_number_is_refused(tmp_path):
    weights = {"w": np.ones((SIDE, SIDE), np.float32)}
    weights["w"][-1, -1] = np.nan
    program = lx.trace(lambda w, x: jnp.dot(x, w["w"]), weights, {"x": lx.TensorSpec(("batch", SIDE), "float32")})
    lx.compile(program, {"batch": (1,)}, name="nan").save(tmp_path / "nan.lepton")
    with pieces.resting(lambda: None), pytest.raises(ArtifactError, match="'w' holds NaN"):
        lx.load(tmp_path / "nan.lepton", check=True)


class FakeDevice:
    """A device on which turns are given, or not."""

    def __init__(self):
        self.turns, self.running = 0, False


@pytest.mark.parametrize("busy", [True, False])
def test_the_loader_rests_only_while_requests_come(monkeypatch, busy):
    device, slept = FakeDevice(), []
    loader = ArtifactLoader(lx.serve.Options(), None, None, [device])
    monkeypatch.setattr(time, "sleep", slept.append)

    def load(*_):
        for _ in range(5):
            device.turns += busy
            pieces.rest()

    monkeypatch.setattr(loader, "_load", load)
    source = Source("somewhere")
    loader.load("m", "1", source, [])
    assert not slept  # nothing was served since the server started
    device.turns += 1
    loader.load("m", "2", source, [])
    assert len(slept) == (5 if busy else 1)
