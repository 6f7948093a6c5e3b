"""Models of equal code run one executable, which goes with the last of them."""

import gc
import shutil
import threading
import weakref

import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.compiler import make_update, sharing, sign
from lepton_xla.kernels import installation

SIDE = 24


def scaled(folder, name, scale, offset=1.0):
    """An artifact that answers `scale * x + offset`; models of one offset have one code."""
    weights = {"w": scale * np.eye(SIDE, dtype=np.float32)}
    inputs = {"x": lx.TensorSpec(("batch", SIDE), "float32")}
    program = lx.trace(lambda w, x: {"y": x @ w["w"] + offset}, weights, inputs)
    lx.compile(program, {"batch": (1, 4)}, name=name).save(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("shared")
    for name, scale, offset in (("two", 2.0, 1.0), ("three", 3.0, 1.0), ("other", 2.0, 7.0)):
        scaled(made, name, scale, offset)
    return made


def code(servable):
    return {id(executable) for _, executable in servable.runtime._executables}


def test_models_of_one_program_share_its_code_and_answer_with_their_own_weights(folder):
    two, three, other = (lx.load(folder / name) for name in ("two", "three", "other"))
    assert code(two) == code(three)
    assert len(code(two)) == 2
    assert not code(two) & code(other)
    x = np.arange(3 * SIDE, dtype=np.float32).reshape(3, SIDE)
    for _ in range(3):
        for servable, scale, offset in ((two, 2, 1), (three, 3, 1), (other, 2, 7)):
            np.testing.assert_array_equal(servable(x=x)["y"], scale * x + offset)


def test_code_is_shared_among_those_alone_who_trust_the_same_keys(folder, tmp_path):
    lx.trust.create_keys(tmp_path / "release")
    lx.trust.create_keys(tmp_path / "other")
    keys = [tmp_path / "release.pub", tmp_path / "both"]
    keys[1].mkdir()
    for name in ("release", "other"):
        shutil.copy(tmp_path / f"{name}.pub", keys[1])
    shutil.copytree(folder / "two", tmp_path / "signed")
    sign(tmp_path / "signed", key=tmp_path / "release.key")
    loaded = [lx.load(folder / "two"), *(lx.load(tmp_path / "signed", trust=each) for each in keys)]
    assert len(set().union(*map(code, loaded))) == 3 * len(code(loaded[0]))
    assert code(lx.load(tmp_path / "signed", trust=keys[0])) == code(loaded[1])


def test_an_update_answers_for_its_part_of_the_code(folder):
    gc.collect()
    base = lx.load(folder / "two")
    alone, weights = base.nbytes, base.weights_bytes
    program = lx.trace(
        lambda w, x: {"y": x @ w["w"] + 1.0},
        {"w": 5 * np.eye(SIDE, dtype=np.float32)},
        {"x": lx.TensorSpec(("batch", SIDE), "float32")},
    )
    make_update(base, program).save(folder / "five")
    update = lx.load(folder / "five", base=base)
    gc.collect()  # what made the update ran the code too
    assert abs(base.nbytes + update.nbytes - (alone + weights)) <= 4
    del base
    gc.collect()
    assert update.nbytes == alone


def test_shared_code_is_counted_once_and_goes_with_its_last_user(folder):
    gc.collect()
    two = lx.load(folder / "two")
    alone, weights = two.nbytes, two.weights_bytes
    three = lx.load(folder / "three")
    assert abs(two.nbytes + three.nbytes - (alone + weights)) <= 2
    (shared, _) = three.runtime._code
    told = weakref.ref(shared)
    del two, shared
    gc.collect()
    assert three.nbytes == alone
    assert told() is not None
    np.testing.assert_array_equal(three(x=np.ones((1, SIDE), np.float32))["y"], np.full((1, SIDE), 4.0))
    del three
    gc.collect()
    assert told() is None
    assert lx.load(folder / "two").nbytes == alone


def test_each_device_has_code_of_its_own(folder):
    here, there = lx.load(folder / "two"), lx.load(folder / "two", device=1)
    assert not code(here) & code(there)
    x = np.ones((1, SIDE), np.float32)
    for servable in (here, there):
        np.testing.assert_array_equal(servable(x=x)["y"], 2 * x + 1)


def test_code_that_is_shared_runs_in_several_threads_at_once(folder):
    models = [(lx.load(folder / name), scale) for name, scale in (("two", 2), ("three", 3)) * 2]
    x = np.random.default_rng(0).normal(size=(4, SIDE)).astype(np.float32)
    wrong = []

    def ask(servable, scale):
        for turn in range(100):
            if not np.array_equal(servable(x=x + turn)["y"], scale * (x + turn) + np.float32(1)):
                wrong.append((scale, turn))

    threads = [threading.Thread(target=ask, args=each) for each in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_models_that_load_at_once_find_one_code(folder):
    gate, found = threading.Barrier(4), []

    def load(name):
        gate.wait()
        found.append(lx.load(folder / name))

    threads = [threading.Thread(target=load, args=(name,)) for name in ("two", "three") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({frozenset(code(each)) for each in found}) == 1


def test_code_is_told_by_its_program_its_kernels_and_its_devices_or_else_by_its_bytes(monkeypatch):
    made = []

    class Read:
        def __init__(self, blob):
            self.loaded = blob
            made.append(blob)

    monkeypatch.setattr(sharing.Code, "read", lambda blob, devices, name: Read(blob))
    kernel = installation.PREFIX.encode() + b"int8"
    first = [b"one", ("cpu",), "batch=1", "program"]
    held = [sharing.shared_code(*first)]
    assert sharing.shared_code(b"compiled again", *first[1:]) is held[0]
    for at, value in ((0, b"one " + kernel), (1, ("gpu",)), (2, "batch=4"), (3, "another"), (3, "")):
        held.append(sharing.shared_code(*(value if place == at else each for place, each in enumerate(first))))
    assert sharing.shared_code(b"one", ("cpu",), "of another name", "") is held[-1]
    held.append(sharing.shared_code(b"other", ("cpu",), "batch=1", ""))
    assert len({id(each) for each in held}) == len(made) == 7
