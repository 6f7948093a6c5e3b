"""Models that do not fit into memory together: loaded on demand, evicted, and really given back."""

import asyncio
import gc
import json
import re
import shutil
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
from lepton_xla.serve import server as server_module
from lepton_xla.serve.batching.device import Device
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.models import trimming
from lepton_xla.serve.models.memory import Memory
from lepton_xla.serve.models.trimming import Trimmer, trim


class Handle:
    """A loaded model of so many bytes."""

    def __init__(self, name, nbytes, used_s, device=0):
        self.name = name
        self.nbytes, self.used_s, self.devices = nbytes, used_s, (device,)
        self.pinned = self.busy = False
        self.requests = 0


class Fakes:
    """A registry and a manager in one, of models whose sizes are given."""

    def __init__(self, sizes, load_s=0.0):
        self.sizes, self.load_s = sizes, load_s
        self.handles, self.log, self.clock = {}, [], 0.0
        self.broken, self.partly_broken = set(), set()

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
        self.handles[name].requests += 1

    async def load(self, name, overrides=None, who=""):
        device = (overrides or {}).get("device", 0)
        self.log.append(f"+{name}@{device}" if device else f"+{name}")
        await asyncio.sleep(self.load_s)
        if name in self.broken:
            raise RepositoryError("failed", "its disk is gone")
        self.clock += 1.0
        self.handles[name] = Handle(name, self.sizes[name], self.clock, device)
        if name in self.partly_broken:
            raise RepositoryError("invalid", "version 9: it is damaged")

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
        for name in "abca":
            await subject.bring(name, lambda name=name: fakes.use(name))
        await subject.bring("d", lambda: fakes.use("d"))  # for b
        await subject.bring("b", lambda: None)  # for c
        assert fakes.log == ["+a", "+b", "+c", "+d", "-b", "-c", "+b"]
        return fakes, subject

    _, subject = asyncio.run(main())
    assert subject.nbytes <= 30
    assert (subject.loads, subject.evictions) == (5, 2)


def test_a_model_that_is_asked_for_often_stays_until_it_has_gone_cold():
    async def main():
        fakes, subject = memory(dict.fromkeys("abcd", 10), 20)
        subject._sizes.update({name: (size, 1) for name, size in fakes.sizes.items()})

        async def ask(names):
            for name in names:
                await subject.bring(name, lambda: None)
                fakes.use(name)

        await ask("a" * 40)
        await ask("bcdbcdbcd")  # the one used least recently would be a
        assert "a" in fakes.handles
        assert fakes.log.count("+a") == 1
        await ask("bcd" * 12)  # which are still asked for less often, all in all
        assert "a" not in fakes.handles

    asyncio.run(main())


def test_loads_of_unequal_traffic_are_nearer_to_the_best_that_knows_the_shares_than_those_of_lru():
    models, room = 40, 10
    shares = 1.0 / np.arange(1, models + 1) ** 1.1
    shares /= shares.sum()
    drawn = np.random.default_rng(0).choice(models, 600, p=shares)

    def loads(goes):
        held, count = {}, 0
        for at, model in enumerate(drawn):
            count += model not in held
            if model not in held and len(held) == room:
                del held[min(held, key=lambda each: goes(each, held))]
            held[model] = at
        return count

    async def main():
        fakes, subject = memory({str(model): 1 for model in range(models)}, room)
        subject._sizes.update(dict.fromkeys(fakes.sizes, (1, 1)))
        for model in drawn:
            await subject.bring(str(model), lambda: None)
            fakes.use(str(model))
        return subject.loads

    recent, known = loads(lambda each, held: held[each]), loads(lambda each, _: shares[each])
    assert known < asyncio.run(main()) < (recent + known) / 2


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
        subject._sizes.update({name: (size, 1) for name, size in fakes.sizes.items()})
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
        subject._sizes.update({name: (size, 1) for name, size in fakes.sizes.items()})
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


def test_a_version_that_cannot_be_loaded_does_not_keep_the_others_from_answering():
    async def main():
        fakes, subject = memory({"a": 10, "b": 10, "large": 30}, 10)
        fakes.partly_broken = {"a", "large"}
        for name in "bab":
            await subject.bring(name, lambda name=name: fakes.use(name))
        with pytest.raises(RepositoryError, match="version 9: it is damaged"):  # who has it loaded is told
            await subject.load("a")
        with pytest.raises(HTTPError, match="more than the memory for all"):
            await subject.bring("large", lambda: None)
        return fakes.log, subject

    log, subject = asyncio.run(main())
    assert log == ["+b", "+a", "-b", "-a", "+b", "-b", "+a", "+large", "-large"]
    assert (subject.loads, subject.evictions) == (5, 3)


# Several devices.


def of_two(sizes, budget, **options):
    fakes = Fakes(sizes)
    subject = Memory(fakes, fakes, budget, options.pop("wait_s", 1.0), devices=2)
    subject._sizes.update({name: (size, 1) for name, size in sizes.items()})
    return fakes, subject


def test_a_model_goes_where_there_is_most_room_and_each_device_has_the_budget():
    async def main():
        fakes, subject = of_two(dict.fromkeys("abcde", 10), 20)
        for name in "abcd":
            await subject.bring(name, lambda name=name: fakes.use(name))
        assert fakes.log == ["+a", "+b@1", "+c", "+d@1"]
        await subject.bring("e", lambda: None)  # for a, the least recently used
        assert fakes.log[4:] == ["-a", "+e"]
        assert subject.nbytes <= 40
        fakes.use("b")
        await subject.bring("a", lambda: None)  # for c, on the first device
        assert fakes.log[6:] == ["-c", "+a"]

    asyncio.run(main())


def test_a_model_moves_where_that_makes_room_and_nothing_is_evicted():
    async def main():
        fakes, subject = of_two({"a": 10, "b": 10, "c": 25, "late": 10}, 30)
        for name in ("a", "b"):
            await subject.bring(name, lambda: None)
        fakes.handles["b"].pinned = True  # it may not go, but it may move
        fakes.handles["a"].busy = True
        await subject.bring("c", lambda: None)
        return fakes, subject

    fakes, subject = asyncio.run(main())
    assert fakes.log == ["+a", "+b@1", "+a@1", "+c"]
    assert {name: each.devices for name, each in fakes.handles.items()} == {"a": (1,), "b": (1,), "c": (0,)}
    assert (subject.moves, subject.evictions) == (1, 0)


def test_a_model_that_cannot_move_is_evicted_instead():
    async def main():
        fakes, subject = of_two({"a": 10, "b": 10, "c": 25}, 30)
        for name in ("a", "b"):
            await subject.bring(name, lambda: None)
        fakes.broken |= {"a", "b"}
        await subject.bring("c", lambda: None)
        return fakes

    fakes = asyncio.run(main())
    assert fakes.log == ["+a", "+b@1", "+a@1", "+b", "-a", "+c"]
    assert {name: each.devices for name, each in fakes.handles.items()} == {"b": (1,), "c": (0,)}


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
        trim()
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


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(server_module, "devices_of_process", lambda: [Device()])


def test_a_server_under_a_budget_answers_for_all_models_and_its_resident_size_follows(repository, one_device):
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


def test_a_model_larger_than_the_memory_is_507_before_it_is_loaded(repository, one_device):
    with Server(repository=repository, options=Options(port=0, memory=1 << 20)) as server:
        status, _, answer = exchange(server, "GET", "/v2/models/m1")
        assert status == 507
        assert re.search("model 'm1' takes 9[0-9]* bytes, more than the memory for all, 1048576", answer.decode())
        assert server.memory.loads == 0


def test_a_server_of_two_devices_uses_both_and_moves_a_model(repository, tmp_path):
    large = np.full((SIDE, 2 * SIDE), 7.0, np.float32)
    program = lx.trace(lambda w, x: x @ w["w"], {"w": large}, {"x": lx.TensorSpec(("batch", SIDE), "float32")})
    root = tmp_path / "MODELS"
    shutil.copytree(repository, root)
    (root / "m0" / "model.toml").unlink()
    lx.compile(program, {"batch": (1,)}, name="large").save(root / "large" / "1.lepton")
    x = np.ones((1, SIDE), np.float32)
    with Server(repository=root, options=Options(port=0, memory=21 << 20)) as server, Client(server.url) as client:

        def where():
            return {handle.signature.name: handle.devices for handle in server.models}

        for index in (0, 1):
            client.infer(f"m{index}", x=x)
        assert where() == {"m0": (0,), "m1": (1,)}
        for handle in server.models:
            (weight,) = handle.model.runtime.weights
            assert [device.id for device in weight.devices()] == list(handle.devices)
        assert np.all(client.infer("large", x=x)["output"] == 7.0 * SIDE)
        assert where() == {"m0": (1,), "m1": (1,), "large": (0,)}
        assert (server.memory.moves, server.memory.evictions) == (1, 0)
        for index in (0, 1):
            assert np.all(client.infer(f"m{index}", x=x)["output"] == SIDE * (1.0 + index))
        assert 'lepton_model_devices{device="1",model="m0",version="1"} 1.0' in client.metrics()
        client.infer("m2", x=x)  # where the least recently used goes for it
        assert where()["m2"] in ((0,), (1,))
        assert server.memory.evictions >= 1


def test_without_a_budget_models_are_spread_over_the_devices(repository):
    with Server(repository=repository, options=Options(port=0)) as server:
        found = sorted(handle.devices for handle in server.models)
        assert found in ([(0,), (0,), (1,), (1,), (1,)], [(0,), (0,), (0,), (1,), (1,)])
        assert len({id(handle.scheduler.device) for handle in server.models}) == 2


def test_the_allocator_is_held_up_once_for_many_models_that_go(monkeypatch):
    trims = []
    monkeypatch.setattr(trimming, "trim", lambda: trims.append(threading.current_thread()))

    async def go(times):
        trimmer = Trimmer()
        for _ in range(times):
            await trimmer.trim()
        return trimmer

    async def main():
        monkeypatch.setattr(trimming, "_EVERY_S", 3600.0)
        trimmer = await go(20)
        assert (len(trims), trimmer._later.done()) == (1, False)
        trimmer._later.cancel()
        monkeypatch.setattr(trimming, "_EVERY_S", 0.05)
        trims.clear()
        trimmer = await go(2)  # what was left out comes later
        while trimmer._later is not None and not trimmer._later.done():
            await asyncio.sleep(0.01)
        assert len(trims) == 2

    asyncio.run(main())
    assert threading.current_thread() not in trims


def test_what_is_freed_goes_back_to_the_system():
    """Small blocks below one that stays: the allocator gives them back only when it is told to."""
    blocks = [bytes(4096) for _ in range(20_000)]
    stays = blocks[-1]
    full = resident()
    del blocks
    trim()
    assert stays is not None
    assert full - resident() > 0.8 * 20_000 * 4096
