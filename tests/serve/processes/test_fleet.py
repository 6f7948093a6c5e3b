"""In what order workers prepare and commit a change, and what is left if one of them fails, dies or joins."""

import asyncio

import pytest

from lepton_xla.serve.models.changes import Change, Source, State
from lepton_xla.serve.processes import control
from lepton_xla.serve.processes.fleet import Fleet

ONE, TWO = Source("1.lepton"), Source("2.lepton")


class Worker:
    """A worker as the supervisor sees it, which answers when it is told to."""

    def __init__(self, name):
        self.name = name
        self.ready = True
        self.reason = ""
        self.process = self
        self.killed = False
        self.got = []

    def send(self, message):
        self.got.append(message)

    def kill(self):
        self.killed = True

    @property
    def kinds(self):
        return [type(message).__name__.lower() for message in self.got]


class Run:
    def __init__(self, count=2):
        self.workers = [Worker(f"worker {number + 1}") for number in range(count)]
        self.caught_up = []
        self.fleet = Fleet(self.workers, self.caught_up.append)

    async def turn(self):
        for _ in range(10):
            await asyncio.sleep(0)

    async def answer(self, worker, **failed):
        """A worker answers the last message that it got."""
        last = worker.got[-1]
        if isinstance(last, control.Prepare):
            self.fleet.prepared(worker, last.number, failed, {})
        else:
            self.fleet.freed(worker, last.number)
        await self.turn()

    async def load(self, version, source):
        """All of a change that goes well."""
        change = Change("m", {version: source})
        task = asyncio.ensure_future(self.fleet.prepare(1, change))
        for worker in self.workers:
            await self.turn()
            if worker.ready:
                await self.answer(worker)
        assert await task == {}
        self.fleet.commit(1, change)


def test_one_prepares_then_the_others_and_only_then_all_commit():
    async def main():
        run = Run(3)
        change = Change("m", {"1": ONE})
        task = asyncio.ensure_future(run.fleet.prepare(7, change))
        await run.turn()
        assert [worker.kinds for worker in run.workers] == [["prepare"], [], []]
        await run.answer(run.workers[0])
        assert [worker.kinds for worker in run.workers] == [["prepare"]] * 3
        await run.answer(run.workers[2])
        assert not task.done()
        await run.answer(run.workers[1])
        assert await task == {}
        ended = asyncio.ensure_future(run.fleet.commit(7, change))
        assert [worker.kinds for worker in run.workers] == [["prepare", "commit"]] * 3
        for worker in run.workers:
            assert not ended.done()
            await run.answer(worker)
        await ended

    asyncio.run(main())


def test_what_one_cannot_load_the_others_are_not_asked_for():
    async def main():
        run = Run()
        task = asyncio.ensure_future(run.fleet.prepare(7, Change("m", {"1": ONE})))
        await run.turn()
        await run.answer(run.workers[0], **{"1": "torn"})
        assert await task == {"1": "torn"}
        assert run.workers[1].got == []

    asyncio.run(main())


def test_of_several_versions_the_others_are_asked_for_those_that_one_could_load():
    """All workers have what is put then: a commit that one of them had not prepared would be its end."""

    async def main():
        run = Run(3)
        change = Change("m", {"1": ONE, "2": TWO}, labels={"stable": "1"})
        task = asyncio.ensure_future(run.fleet.prepare(7, change))
        await run.turn()
        await run.answer(run.workers[0], **{"2": "torn"})
        for worker in run.workers[1:]:
            assert worker.got == [control.Prepare(7, Change("m", {"1": ONE}, labels={"stable": "1"}))]
            await run.answer(worker)
        assert await task == {"2": "torn"}

    asyncio.run(main())


def test_a_worker_that_dies_has_loaded_nothing_and_one_that_dies_later_does_not_hold_up_the_others():
    async def main():
        run = Run()
        task = asyncio.ensure_future(run.fleet.prepare(7, Change("m", {"1": ONE, "2": TWO})))
        await run.turn()
        run.workers[0].ready = False
        run.fleet.gone(run.workers[0])
        reason = "worker 1 has ended while it was loaded"
        assert await task == {"1": reason, "2": reason}
        ended = asyncio.ensure_future(run.fleet.commit(7, Change("m")))
        run.workers[1].ready = False
        run.fleet.gone(run.workers[1])
        await ended

    asyncio.run(main())


def test_without_a_worker_nothing_is_loaded():
    async def main():
        run = Run()
        for worker in run.workers:
            worker.ready = False
        assert await run.fleet.prepare(7, Change("m", {"1": ONE})) == {"1": "no worker is ready to load it"}

    asyncio.run(main())


def test_a_worker_that_is_started_catches_up_with_what_is_committed_by_then():
    async def main():
        run = Run()
        first, second = run.workers
        second.ready = False
        await run.load("1", ONE)
        run.fleet.joined(second)
        await run.turn()
        assert second.got[-1].change == Change("m", {"1": ONE})
        await run.load("2", TWO)  # by the first alone, while the second still loads version 1
        assert first.kinds == ["prepare", "commit"] * 2
        await run.answer(second)
        assert second.kinds == ["prepare", "commit", "prepare"]
        assert run.caught_up == []
        assert second.got[-1].change.load == {"2": TWO}
        await run.answer(second)
        assert (second.kinds[-1], run.caught_up) == ("commit", [second])

    asyncio.run(main())


def test_a_worker_that_becomes_ready_while_others_prepare_prepares_too():
    async def main():
        run = Run()
        first, second = run.workers
        second.ready = False
        task = asyncio.ensure_future(run.fleet.prepare(7, Change("m", {"1": ONE})))
        await run.turn()
        second.ready = True
        await run.answer(first)
        assert (second.kinds, task.done()) == (["prepare"], False)
        await run.answer(second)
        assert await task == {}

    asyncio.run(main())


def test_a_worker_that_cannot_catch_up_is_ended():
    async def main():
        run = Run()
        _, second = run.workers
        second.ready = False
        await run.load("1", ONE)
        run.fleet.joined(second)
        await run.turn()
        await run.answer(second, **{"1": "gone"})
        assert (second.killed, second.reason, run.caught_up) == (True, "m version 1 cannot be loaded: gone", [])
        run.fleet.joined(second)  # it is started again, and holds nothing
        await run.turn()
        run.fleet.gone(second)
        await run.turn()
        assert run.caught_up == []

    asyncio.run(main())


@pytest.mark.parametrize("labels", [{}, {"stable": "1"}])
def test_what_it_catches_up_with_has_labels_and_no_versions_that_are_gone(labels):
    async def main():
        run = Run(1)
        run.fleet._states = {"m": State({"1": ONE}, labels), "gone": State()}
        (worker,) = run.workers
        run.fleet.joined(worker)
        await run.turn()
        await run.answer(worker)
        assert [message.change for message in worker.got] == [Change("m", {"1": ONE}, (), labels)] * 2

    asyncio.run(main())
