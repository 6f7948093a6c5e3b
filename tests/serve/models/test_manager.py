"""What a manager loads, keeps and takes out, with an executor and a repository that are set by hand."""

import asyncio
import pathlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.errors import RepositoryError
from lepton_xla.serve.models import manager as managing
from lepton_xla.serve.models.changes import Change, Source, State, difference
from lepton_xla.serve.models.manager import Manager
from lepton_xla.serve.models.repository import Found
from lepton_xla.serve.models.settings import ModelSettings


class Shelf:
    """A repository: `models` is what it holds."""

    root = pathlib.Path("MODELS")

    def __init__(self, **models):
        self.models = models
        self.trouble = None

    def scan(self):
        if self.trouble:
            raise RepositoryError("failed", self.trouble)
        return dict(self.models)

    def find(self, name):
        if self.trouble:
            raise RepositoryError("failed", self.trouble)
        if name not in self.models:
            raise RepositoryError("missing", f"MODELS: there is no model {name!r}")
        return self.models[name]


class Works:
    """An executor: `bad` versions cannot be loaded, `gate` holds loading back, `done` lists what was committed."""

    def __init__(self):
        self.bad = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.freed = asyncio.Event()
        self.freed.set()
        self.prepared = []
        self.done = []
        self.at_once = 0

    async def prepare(self, number, change):
        self.prepared.append((change.name, *change.load))
        self.at_once += 1
        await self.gate.wait()
        self.at_once -= 1
        return {version: self.bad[version] for version in change.load if version in self.bad}

    def commit(self, number, change):
        self.done.append(change)
        return self.freed.wait()


def found(name, *versions, stamp=1, problem=None, **settings):
    paths = {version: pathlib.Path(f"MODELS/{name}/{version}.lepton") for version in versions}
    return Found(name, paths, ModelSettings(**settings), problem, dict.fromkeys(versions, (stamp,)))


class Run:
    """A manager, started."""

    def __init__(self, *models, **options):
        self.shelf = Shelf(**{each.name: each for each in models})
        self.works = Works()
        self.told = []
        self.manager = Manager(self.shelf, self.works, record=lambda *what, **more: self.told.append(what), **options)

    async def see(self, *models):
        """Lets the manager look at other contents."""
        self.shelf.models = {each.name: each for each in models}
        await self.manager.refresh()
        await self.rest()

    async def rest(self):
        for _ in range(20):
            await asyncio.sleep(0)

    def loaded(self, name="m"):
        return list(self.manager.states.get(name, State()).versions)

    def labels(self, name="m"):
        return self.manager.states[name].labels

    async def index(self):
        return [(each.name, each.version, each.state, each.reason) for each in await self.manager.index()]


def test_what_is_wanted_is_loaded_and_what_is_not_is_taken_out():
    async def main():
        run = Run(found("m", "1", "2"), found("n", "7"))
        await run.manager.start()
        assert (run.loaded(), run.loaded("n")) == (["2"], ["7"])
        await run.see(found("m", "1", "2", "3"), found("n", "7"))
        assert run.loaded() == ["3"]
        last = run.works.done[-1]
        assert (list(last.load), last.retire) == (["3"], ("2",)), "one change, so that both happen at once"
        await run.see(found("m", "1", "2", "3", versions="all"))
        assert (run.loaded(), run.loaded("n")) == (["3", "1", "2"], [])
        before = len(run.works.done)
        await run.see(found("m", "1", "2", "3", versions="all"))
        assert len(run.works.done) == before, "nothing has changed"
        assert ("repository", "unload", "n/7", "done") in run.told

    asyncio.run(main())


def test_what_cannot_be_loaded_leaves_the_old_one_serving_and_is_tried_again(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(managing, "monotonic", lambda: now)

    async def main():
        nonlocal now
        run = Run(found("m", "1"))
        await run.manager.start()
        run.works.bad["2"] = "its manifest is torn"
        await run.see(found("m", "1", "2"))
        assert run.loaded() == ["1"]
        assert await run.index() == [("m", "1", "READY", ""), ("m", "2", "UNAVAILABLE", "its manifest is torn")]
        tries = len(run.works.prepared)
        await run.see(found("m", "1", "2"))
        assert len(run.works.prepared) == tries, "not before a second has passed"
        waits = []
        for _ in range(9):
            began = now
            while len(run.works.prepared) == tries:
                now += 0.5
                await run.see(found("m", "1", "2"))
            tries = len(run.works.prepared)
            waits.append(now - began)
        assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
        assert run.told.count(("repository", "load", "m/2", "failed")) == 1
        del run.works.bad["2"]
        await run.see(found("m", "1", "2", stamp=2))
        assert run.loaded() == ["2"], "at once, since the artifact is another"
        assert await run.index() == [("m", "2", "READY", "")]

    asyncio.run(main())


def test_a_version_replaced_in_place_is_loaded_anew_and_a_bad_one_keeps_the_old():
    async def main():
        run = Run(found("m", "1"))
        await run.manager.start()
        await run.see(found("m", "1", stamp=2))
        assert run.works.done[-1].load["1"].stamp == (2,)
        run.works.bad["1"] = "torn"
        await run.see(found("m", "1", stamp=3))
        assert run.manager.states["m"].versions["1"].stamp == (2,)
        assert await run.index() == [("m", "1", "READY", "torn")]

    asyncio.run(main())


def test_a_label_moves_only_to_a_loaded_version_and_keeps_what_it_stands_on():
    async def main():
        run = Run(found("m", "1", labels={"stable": "1"}))
        await run.manager.start()
        run.works.gate.clear()
        task = asyncio.ensure_future(run.see(found("m", "1", "2", labels={"stable": "2"})))
        await run.rest()
        await task
        assert (run.labels(), run.loaded()) == ({"stable": "1"}, ["1"])
        run.works.gate.set()
        await run.rest()
        assert (run.labels(), run.loaded()) == ({"stable": "2"}, ["2"])
        run.works.bad["3"] = "torn"
        await run.see(found("m", "1", "2", "3", labels={"stable": "3", "canary": "3"}))
        assert (run.labels(), run.loaded()) == ({"stable": "2"}, ["2"])
        await run.see(found("m", "1", "2", "4", labels={"stable": "9"}))
        assert (run.labels(), run.loaded()) == ({"stable": "2"}, ["2", "4"]), "version 9 is not there"
        assert ("m", "9", "UNAVAILABLE", "label 'stable' is to stand on it, and it is not in the repository") in (
            await run.index()
        )
        await run.see(found("m", "1", "2", "4", labels={}))
        assert (run.labels(), run.loaded()) == ({}, ["4"])

    asyncio.run(main())


def test_one_model_that_cannot_be_read_or_loaded_hides_no_other():
    async def main():
        run = Run(found("bad", problem="model.toml: no such key"), found("torn", "1"), found("m", "1"))
        run.works.bad["1"] = "x"
        await run.manager.start()
        run.works.bad.clear()
        await run.see(found("bad", "1", problem="model.toml: no such key"), found("m", "1", "2"))
        assert (run.loaded(), run.loaded("bad")) == (["2"], [])
        assert ("bad", "", "UNAVAILABLE", "model.toml: no such key") in await run.index()
        await run.see(found("bad", "1"), found("m", "1", "2"))
        assert run.loaded("bad") == ["1"]
        await run.see(found("bad", problem="gone wrong"), found("m", "1", "2"))
        assert run.loaded("bad") == ["1"], "it keeps what it has"
        run.shelf.trouble = "MODELS: cannot be read"
        await run.manager.refresh()
        await run.rest()
        assert (run.loaded(), run.loaded("bad")) == (["2"], ["1"])

    asyncio.run(main())


def test_one_change_at_a_time_of_a_model_and_others_go_on():
    async def main():
        run = Run(found("m", "1"), found("n", "1"))
        await run.manager.start()
        run.works.gate.clear()
        for version in ("2", "3", "4"):
            await run.see(found("m", version), found("n", "1"))
        assert run.works.prepared.count(("m", "2")) == 1
        assert run.works.at_once == 1
        await run.see(found("m", "4"), found("n", "2"))
        assert run.works.at_once == 2
        assert ("m", "2", "LOADING", "") in await run.index()
        run.works.gate.set()
        await run.rest()
        await run.see(found("m", "4"), found("n", "2"))
        assert (run.loaded(), run.loaded("n")) == (["4"], ["2"])

    asyncio.run(main())


def test_what_is_closed_begins_nothing_more():
    async def main():
        run = Run(found("m", "1"))
        await run.manager.start()
        run.works.gate.clear()
        await run.see(found("m", "2"))
        run.manager.close()
        run.works.gate.set()
        await run.see(found("m", "3"))
        assert run.loaded() == ["1"]
        assert run.works.prepared == [("m", "1"), ("m", "2")]
        assert len(run.works.done) == 1

    asyncio.run(main())


def test_the_index_tells_what_is_on_its_way_out():
    async def main():
        run = Run(found("m", "1"), found("never"), explicit=True)
        await run.manager.start(["m"])
        run.works.freed.clear()
        await run.manager.unload("m")
        await run.rest()
        assert await run.index() == [("m", "1", "UNLOADING", ""), ("never", "", "", "")]
        run.works.freed.set()
        await run.rest()
        assert await run.index() == [("m", "", "", ""), ("never", "", "", "")]

    asyncio.run(main())


def test_explicit_mode_loads_what_is_asked_for_and_nothing_else():
    async def main():
        run = Run(found("m", "1"), found("n", "1"), explicit=True)
        await run.manager.start(["n"])
        assert (run.loaded(), run.loaded("n")) == ([], ["1"])
        await run.manager.load("m", who="ci")
        assert run.loaded() == ["1"]
        assert ("ci", "load", "m/1", "done") in run.told
        tries = len(run.works.prepared)
        await run.manager.load("m")
        assert len(run.works.prepared) == tries, "it is loaded, and has not changed"
        run.shelf.models["m"] = found("m", "1", "2")
        await run.manager.load("m")
        assert run.loaded() == ["2"]
        run.works.bad["3"] = "torn"
        run.shelf.models["m"] = found("m", "1", "2", "3")
        with pytest.raises(RepositoryError, match="version 3: torn") as caught:
            await run.manager.load("m")
        assert (caught.value.kind, run.loaded()) == ("invalid", ["2"])
        run.manager._found["m"] = found("m", "1", problem="model.toml: torn")
        await run.manager.unload("m", who="ci")
        assert run.loaded() == []
        for name, kind in (("m", "missing"), ("nobody", "missing")):
            with pytest.raises(RepositoryError) as caught:
                await run.manager.unload(name)
            assert caught.value.kind == kind
        with pytest.raises(RepositoryError, match="no model of that name"):
            await run.manager.load("nobody")
        run.shelf.models["empty"] = found("empty")
        with pytest.raises(RepositoryError, match="no version"):
            await run.manager.load("empty")
        run.shelf.trouble = "the store is away"
        with pytest.raises(RepositoryError, match="the store is away"):
            await run.manager.load("nobody")
        run.shelf.trouble = None
        with pytest.raises(RepositoryError, match="there is no model 'nobody'"):
            await Manager(run.shelf, run.works, explicit=True).start(["nobody"])

    asyncio.run(main())


def test_overrides_hold_until_the_next_load_and_bad_ones_not_at_all():
    async def main():
        run = Run(found("m", "1"))
        await run.manager.start()
        await run.manager.load("m", {"max_batch_size": 8})
        assert run.manager.states["m"].versions["1"].max_batch_size == 8
        await run.see(found("m", "1"))
        assert run.manager.states["m"].versions["1"].max_batch_size == 8
        run.works.bad["1"] = "9 is no compiled size"
        with pytest.raises(RepositoryError, match="9 is no compiled size"):
            await run.manager.load("m", {"max_batch_size": 9})
        tries = len(run.works.prepared)
        await run.see(found("m", "1"))
        assert len(run.works.prepared) == tries
        assert await run.index() == [("m", "1", "READY", "")]
        run.works.bad.clear()
        await run.manager.load("m")
        assert run.manager.states["m"].versions["1"].max_batch_size is None
        with pytest.raises(RepositoryError, match="watched") as caught:
            await run.manager.unload("m")
        assert caught.value.kind == "conflict"

    asyncio.run(main())


versions = st.dictionaries(st.sampled_from("123"), st.sampled_from("ab").map(Source))
labels = st.dictionaries(st.sampled_from(["stable", "canary"]), st.sampled_from("1234"))


@given(versions, labels, versions, labels, st.sets(st.sampled_from("123")))
def test_whatever_is_wanted_and_fails_labels_stand_on_loaded_versions_and_nothing_is_lost(
    before, stood, wanted, wanted_labels, failed
):
    held = State(before, {label: version for label, version in stood.items() if version in before})
    target = State(wanted, wanted_labels)
    change = difference("m", held, target)
    if change is None:
        assert before.items() >= wanted.items()
        return
    failed &= set(change.load)
    after = held.after(change.without(failed, held))
    assert set(after.labels.values()) <= set(after.versions)
    assert set(after.labels) <= set(wanted_labels)
    for label, version in wanted_labels.items():
        if version in wanted and version not in failed:
            assert after.labels[label] == version
        elif label in held.labels:
            assert after.labels[label] in {held.labels[label], version}
    if failed:
        assert set(before) <= set(after.versions)
    else:
        assert after.versions.items() >= wanted.items()
        assert difference("m", after, target) is None, "it has come to rest"
        assert set(after.versions) - set(wanted) <= set(after.labels.values())


def test_changes_of_a_state():
    one, two = Source("a", (1,)), Source("b", (2,))
    held = State({"1": one}, {"stable": "1"})
    assert difference("m", held, held) is None
    change = difference("m", held, State({"2": two}, {"stable": "2"}))
    assert change == Change("m", {"2": two}, ("1",), {"stable": "2"})
    assert held.after(change) == State({"2": two}, {"stable": "2"})
    left = change.without({"2": "torn"}, held)
    assert left == Change("m", {}, (), {"stable": "1"})
    assert held.after(left) == held
    other = msgspec.structs.replace(one, stamp=(9,))
    assert difference("m", held, State({"1": other}, {"stable": "1"})).load == {"1": other}
