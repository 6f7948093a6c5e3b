"""Models that do not fit into memory together: loaded on demand, evicted, and really given back."""

import asyncio
import gc
import json
import re
import threading
import time
import weakref

import numpy as np
import pytest
from serve_fakes import exchange

import lepton_xla as lx
from lepton_xla.compiler.reading import aligned_empty
from lepton_xla.errors import RepositoryError
from lepton_xla.serve import Client, Options, Server
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.models.memory import Memory, _trim


class Handle:
    """A loaded model of so many bytes."""

    def __init__(self, name, nbytes, used_s):
        self.signature = type("Signature", (), {"name": name, "version": "1"})
        self.nbytes, self.used_s = nbytes, used_s
        self.pinned = self.busy = False


class Fakes:
    """A registry and a manager in one, of models whose sizes are given."""

    def __init__(self, sizes, load_s=0.0):
        self.sizes, self.load_s = sizes, load_s
        self.handles, self.log, self.clock, self.broken = {}, [], 0.0, set()

    def __iter__(self):
        return iter(self.handles.values())

    def names(self):
        return list(self.handles)

    def has(self, name):
        return name in self.sizes

    def paths(self, name):
        return []

    def use(self, name):
        self.clock += 1.0
        self.handles[name].used_s = self.clock

    async def load(self, name, overrides=None, who=""):
        self.log.append(f"+{name}")
        await asyncio.sleep(self.load_s)
        if name in self.broken:
            raise RepositoryError("failed", "its disk is gone")
        self.clock += 1.0
        self.handles[name] = Handle(name, self.sizes[name], self.clock)

    async def unload(self, name, who=""):
        self.log.append(f"-{name}")
        del self.handles[name]


def memory(sizes, budget, **options):
    wait_s = options.pop("wait_s", 1.0)
    fakes = Fakes(sizes, **options)
    return fakes, Memory(fakes, fakes, budget, wait_s)


def bring(subject, *names):
    async def main():
        for name in names:
            await subject.bring(name, lambda: None)

    asyncio.run(main())


def test_the_least_recently_used_model_goes():
    async def main():
        fakes, subject = memory(dict.fromkeys("abcd", 10), 30)
        for name in "abc":
            await subject.bring(name, lambda: None)
        fakes.use("a")
        await subject.bring("d", lambda: None)  # for b
        await subject.bring("b", lambda: None)  # for c
        assert fakes.log == ["+a", "+b", "+c", "+d", "-b", "-c", "+b"]
        return fakes, subject

    _, subject = asyncio.run(main())
    assert subject.nbytes <= 30
    assert (subject.loads, subject.evictions) == (5, 2)


def test_room_is_made_before_a_load_once_the_size_is_known():
    async def main():
        fakes, subject = memory({"a": 20, "b": 20}, 30)
        await subject.bring("a", lambda: None)
        await subject.bring("b", lambda: None)  # of unknown size: a goes after it
        await subject.bring("a", lambda: None)
        return fakes.log

    assert asyncio.run(main()) == ["+a", "+b", "-a", "-b", "+a"]


def test_pinned_and_busy_models_stay_and_who_finds_no_room_is_told():
    async def main():
        fakes, subject = memory(dict.fromkeys("abc", 10), 20, wait_s=0.1)
        subject._sizes.update(fakes.sizes)
        await subject.bring("a", lambda: None)
        await subject.bring("b", lambda: None)
        fakes.handles["a"].pinned, fakes.handles["b"].busy = True, True
        with pytest.raises(HTTPError, match="model 'c'") as caught:
            await subject.bring("c", lambda: None)
        assert (caught.value.status, caught.value.headers) == (503, ("Retry-After: 1",))
        fakes.handles["b"].busy = False
        await asyncio.sleep(0.15)
        await subject.bring("c", lambda: None)
        return fakes

    assert sorted(asyncio.run(main()).handles) == ["a", "c"]


def test_however_many_wait_for_a_model_it_is_loaded_once_and_each_is_sure_to_find_it():
    async def main():
        fakes, subject = memory({"a": 10, "b": 10}, 10, load_s=0.02)
        subject._sizes.update(fakes.sizes)
        found = []
        await asyncio.gather(*(
            subject.bring(name, lambda name=name: found.append((name, name in fakes.handles)))
            for name in ["a"] * 20 + ["b"] * 20
        ))  # fmt: skip
        return fakes.log, found

    log, found = asyncio.run(main())
    assert log == ["+a", "-a", "+b"]
    assert sorted(set(found)) == [("a", True), ("b", True)]
    assert len(found) == 40


def test_the_wait_is_bounded_and_the_load_goes_on():
    async def main():
        fakes, subject = memory({"a": 10}, 10, load_s=0.3, wait_s=0.05)
        with pytest.raises(HTTPError, match="is being loaded") as caught:
            await subject.bring("a", lambda: None)
        assert (caught.value.status, caught.value.headers) == (503, ("Retry-After: 1",))
        await asyncio.sleep(0.4)
        return fakes.log, list(fakes.handles)

    assert asyncio.run(main()) == (["+a"], ["a"])


def test_a_model_larger_than_the_budget_is_refused_by_name_and_not_loaded_again():
    async def main():
        fakes, subject = memory({"a": 10, "huge": 31}, 30)
        await subject.bring("a", lambda: None)
        for _ in range(2):
            with pytest.raises(HTTPError, match="model 'huge' takes 31 bytes, more than the memory for all, 30") as no:
                await subject.bring("huge", lambda: None)
            assert no.value.status == 507
        return fakes.log, list(fakes.handles)

    log, left = asyncio.run(main())
    assert log == ["+a", "+huge", "-huge"]  # its size was not known before
    assert left == ["a"]


def test_a_model_that_cannot_be_loaded_is_503_and_the_next_request_tries_again():
    async def main():
        fakes, subject = memory({"a": 10}, 10)
        fakes.broken.add("a")
        with pytest.raises(HTTPError, match="cannot be loaded: its disk is gone") as caught:
            await subject.bring("a", lambda: None)
        assert caught.value.status == 503
        fakes.broken.clear()
        await subject.bring("a", lambda: None)
        return fakes.log

    assert asyncio.run(main()) == ["+a", "+a"]


# Real models.

SIDE = 1500  # 9 MB of weights


def resident():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) << 10


def test_memory_of_arrays_that_other_threads_allocated_is_given_back():
    arrays = []

    def fill():
        array = aligned_empty((5 << 20,), np.float32)
        array[:] = 1
        arrays.append(array)

    before = resident()
    for _ in range(4):
        thread = threading.Thread(target=fill)
        thread.start()
        thread.join()
    assert resident() - before > 70 << 20
    arrays.clear()
    assert resident() - before < 8 << 20


def test_weights_go_with_their_model_and_do_not_wait_for_the_collector_of_cycles(repository):
    gc.collect()
    gc.disable()
    try:
        servable = lx.load(repository / "m1" / "1.lepton")
        servable.run({"batch": 1}, [np.ones((1, SIDE), np.float32)])
        (weight,) = (weakref.ref(array) for array in servable.runtime.weights)
        full = resident()
        del servable
        assert weight() is None
        _trim()
        assert full - resident() > 0.9 * 4 * SIDE * SIDE
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for index in range(5):
        name = f"m{index}"
        weights = {"w": np.full((SIDE, SIDE), 1.0 + index, np.float32)}
        program = lx.trace(
            lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", SIDE), "float32")}
        )  # fmt: skip
        lx.compile(program, {"batch": (1,)}, name=name).save(root / name / "1.lepton")
    (root / "m0" / "model.toml").write_text("[serving]\npinned = true\n")
    return root


def test_a_server_under_a_budget_answers_for_all_models_and_its_resident_size_follows(repository):
    budget = 33 << 20  # three models and a half
    with Server(repository=repository, options=Options(port=0, memory=budget)) as server, Client(server.url) as client:
        assert not server.models.names()
        start, most = resident(), 0
        for index in (0, 1, 2, 3, 4, 1, 2, 3, 4, 1):
            out = client.infer(f"m{index}", x=np.ones((1, SIDE), np.float32))["output"]
            assert np.all(out == SIDE * (1.0 + index))
            assert len(server.models.names()) <= 3
            assert server.memory.nbytes <= budget
            most = max(most, resident() - start)
        assert "m0" in server.models.names()  # pinned
        assert server.memory.loads >= 9
        exact = next(iter(server.models)).nbytes
        assert 4 * SIDE * SIDE < exact < 4 * SIDE * SIDE + (2 << 20)
        # Ten loads of 9 MB: what is evicted is given back before others are loaded.
        assert most < 1.35 * budget
        status, _, answer = exchange(server, "POST", "/v2/models/m9/infer", b"{}")
        assert (status, json.loads(answer)["error"]) == (404, "Request for unknown model: 'm9' is not found")
        full = resident()
        for name in server.models.names():
            asyncio.run_coroutine_threadsafe(server.memory.unload(name), server._loop).result(10)
        until = time.monotonic() + 10
        while full - resident() < 2.5 * 4 * SIDE * SIDE:
            assert time.monotonic() < until, "evicted models are still in memory"
            time.sleep(0.05)


def test_a_model_larger_than_the_memory_is_507_before_it_is_loaded(repository):
    with Server(repository=repository, options=Options(port=0, memory=1 << 20)) as server:
        status, _, answer = exchange(server, "GET", "/v2/models/m1")
        assert status == 507
        assert re.search("model 'm1' takes 9[0-9]* bytes, more than the memory for all, 1048576", answer.decode())
        assert server.memory.loads == 0
