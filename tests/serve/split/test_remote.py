"""A front-end's scheduler and the engine's end of it, joined by a real socket and real shared memory in one process."""

import asyncio
import os
import pickle
import socket
import threading
import types
from time import monotonic

import numpy as np
import pytest
import uvloop
from serve_fakes import Affine, Tokens

from lepton_xla.errors import ServeError
from lepton_xla.serve.batching import scheduler
from lepton_xla.serve.batching.engine import Engine
from lepton_xla.serve.batching.scheduler import Call
from lepton_xla.serve.errors import RefusedError
from lepton_xla.serve.observe.metrics import Metrics
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.protocol.wire import InferRequest, Plan
from lepton_xla.serve.server import Options, schedule
from lepton_xla.serve.split import descriptors, hello, memory, remote
from lepton_xla.serve.split.engine import FrontEnd
from lepton_xla.serve.split.packets import MOST_BYTES, Packets, pair
from lepton_xla.serve.split.remote import RemoteScheduler

MEMORY = 1 << 16


@pytest.fixture(autouse=True)
def _both_ends_share_an_event_loop(monkeypatch):
    """Which a short batch would hold up, as it does only that of the engine where they do not."""
    monkeypatch.setattr(scheduler, "_SHORT_S", 0.0)
    monkeypatch.setattr(scheduler, "_SHORT_ON_ONE_CORE_S", 0.0)


class Asked(Call, kw_only=True, eq=False):
    """A call that keeps what it is told."""

    told: asyncio.Future

    def finish(self, outputs):
        self.told.set_result([bytes(output) for output in outputs])

    def fail(self, refusal):
        self.told.set_exception(refusal)


class Both:
    """Both ends of a link, and what is around them."""

    def __init__(self, servable, memory_bytes=MEMORY, **options):
        self.loop = asyncio.get_running_loop()
        self.signature = signature_of(servable)
        self.metrics, self.engine_metrics = Metrics("front"), Metrics("engine")
        engine = Engine(servable, self.signature)
        self.scheduler = schedule(engine, engine.warm_up(), self.signature, Options(**options), self.engine_metrics)
        self.scheduler.start()
        self.wishes = 0
        self.met = asyncio.Event()
        self.ends = []
        self.well = True
        self.remote = RemoteScheduler(memory_bytes, self.metrics, self.wish, lambda said: self.met.set(), self.loop)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        self.scheduler.stop(5)
        self.remote.close()
        for packets in self.ends:
            packets.close()

    def wish(self):
        self.wishes += 1

    async def link(self):
        ours, theirs = pair()
        self.met.clear()
        self.remote.connect(ours)
        self.join(theirs)
        await asyncio.wait_for(self.met.wait(), 5)
        return self

    def join(self, end):
        self.front = FrontEnd(end, self.scheduler, self.signature, lambda: self.well, self.loop)
        self.ends.append(self.front._packets)

    def ask(self, *arrays, outputs=None, **plan):
        """Submits a call with these inputs; gives it."""
        sizes, slices = {}, []
        for tensor, array in zip(self.signature.inputs, arrays, strict=True):
            sizes |= {dim: size for dim, size in zip(tensor.shape, array.shape, strict=True) if isinstance(dim, str)}
            slices.append((0, array.nbytes))
        wanted = range(len(self.signature.outputs)) if outputs is None else outputs
        key = tuple(self.signature.fit(symbol, sizes[symbol]) for symbol in self.signature.others)
        plan = Plan(
            rows=sizes["batch"], key=key, sizes=sizes, slices=tuple(slices), tail_bytes=0,
            cut=any(sizes[symbol] != size for symbol, size in zip(self.signature.others, key, strict=True)),
            outputs=tuple((index, True) for index in wanted), **plan,
        )  # fmt: skip
        request = InferRequest(
            plan, [memoryview(array.tobytes()) for array in arrays], sum(array.nbytes for array in arrays)
        )
        call = Asked(
            plan.rows, key, monotonic(), nbytes=request.nbytes, request=request, told=self.loop.create_future()
        )
        self.remote.submit(call)
        return call


def affine(rows, n):
    return np.arange(rows * 4, dtype=np.float32).reshape(rows, 4) + n, np.full(rows, n, np.int32)


def check(told, x, n, outputs=(0, 1)):
    expected = [(2 * x + n[:, None]).astype(np.float32), 2 * n]
    for index, data in zip(outputs, told, strict=True):
        np.testing.assert_array_equal(
            np.frombuffer(data, expected[index].dtype).reshape(expected[index].shape), expected[index]
        )


def run(main, timeout=20):
    return asyncio.run(asyncio.wait_for(main, timeout), loop_factory=uvloop.new_event_loop)


def test_calls_of_all_sizes_get_their_results():
    async def main():
        async with Both(Affine()) as both:
            await both.link()
            asked = []
            for n, rows in enumerate((1, 3, 8, 20, 1, 50)):  # the ladder ends at 8: some are split over batches
                x, ns = affine(rows, n)
                for outputs in ((0, 1), (1, 0), (1,)):
                    asked.append((both.ask(x, ns, outputs=outputs), x, ns, outputs))
            for call, x, ns, outputs in asked:
                check(await call.told, x, ns, outputs)
                started, staged, finished, rows, size = call.times
                assert call.arrival_s <= started <= staged <= finished <= monotonic()
                assert 1 <= rows <= size <= 8  # a call may be split, whatever its size
            assert both.engine_metrics.batch_rows.total == 3 * (1 + 3 + 8 + 20 + 1 + 50)

    run(main())


def test_padded_sequences_are_cut_to_their_length():
    async def main():
        async with Both(Tokens()) as both:
            await both.link()
            asked = []
            for rows, seq in ((1, 3), (2, 4), (5, 7), (1, 8)):
                tokens = np.arange(1, rows * seq + 1, dtype=np.int32).reshape(rows, seq)
                asked.append((both.ask(tokens), tokens))
            for call, tokens in asked:
                out, length = await call.told
                np.testing.assert_array_equal(np.frombuffer(out, np.int32).reshape(tokens.shape), tokens + 1)
                np.testing.assert_array_equal(np.frombuffer(length, np.int32), tokens.shape[1])

    run(main())


def test_memory_is_used_again_and_its_end_is_503():
    async def main():
        async with Both(Affine((1, 4, 8)), memory_bytes=1 << 13) as both:
            await both.link()
            blocks = (1 << 13) // (1 << 8)
            for turn in range(20):
                asked = [(both.ask(*affine(1, turn)), turn) for _ in range(blocks)]
                with pytest.raises(RefusedError, match="too much waits") as caught:
                    await both.ask(*affine(1, turn)).told
                assert caught.value.status == 503
                for call, n in asked:
                    check(await call.told, *affine(1, n))
            with pytest.raises(RefusedError) as caught:
                await both.ask(*affine(600, 1)).told
            assert caught.value.status == 413
            assert both.metrics.rejected == 20

    run(main())


def test_refusals_of_the_engine_come_through():
    async def main():
        async with Both(Affine(), priority_levels=2, max_queue_rows=16) as both:
            await both.link()
            call = both.ask(*affine(1, 1), priority=3)
            with pytest.raises(RefusedError, match="priority") as caught:
                await call.told
            assert caught.value.status == 400
            call = both.ask(*affine(1, 1), timeout_s=1e-9)
            with pytest.raises(RefusedError) as caught:
                await call.told
            assert caught.value.status == 504
            call = both.ask(*affine(1, -1))  # the model fails
            with pytest.raises(RefusedError, match="inference failed") as caught:
                await call.told
            assert caught.value.status == 500
            check(await both.ask(*affine(1, 5)).told, *affine(1, 5))

    run(main())


def test_a_cancelled_call_is_forgotten_and_its_block_free():
    async def main():
        servable = Affine()
        async with Both(servable, memory_bytes=1 << 10) as both:
            await both.link()
            servable.gate.clear()
            threading.Timer(0.2, servable.gate.set).start()
            asked = [both.ask(*affine(1, n)) for n in range(4)]
            for call in asked[1:]:
                both.remote.cancel(call)
                both.remote.cancel(call)
            while len(both.remote._calls) > 1:
                await asyncio.sleep(0.01)
            assert not any(call.told.done() for call in asked)
            again = [both.ask(*affine(1, 10 + n)) for n in range(3)]
            check(await asked[0].told, *affine(1, 0))
            for n, call in enumerate(again):
                check(await call.told, *affine(1, 10 + n))
            assert not any(call.told.done() for call in asked[1:])
            assert both.engine_metrics.cancelled == 3

    run(main())


def test_an_engine_that_is_gone_fails_what_it_was_asked_and_the_next_serves():
    async def main():
        servable = Affine()
        async with Both(servable) as both:
            await both.link()
            servable.gate.clear()
            asked = [both.ask(*affine(1, n)) for n in range(3)]
            both.remote.cancel(asked[2])
            both.front._packets.close()
            for call in asked[:2]:
                with pytest.raises(RefusedError) as caught:
                    await call.told
                assert caught.value.status == 503
            assert not asked[2].told.done()
            assert (both.remote.ready, both.wishes) == (False, 1)
            with pytest.raises(RefusedError) as caught:
                await both.ask(*affine(1, 1)).told
            assert caught.value.status == 503
            servable.gate.set()
            await both.link()
            check(await both.ask(*affine(2, 7)).told, *affine(2, 7))

    run(main())


def test_an_engine_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(remote, "_PING_S", 0.02)

    async def main():
        async with Both(Affine()) as both:
            await both.link()
            await asyncio.sleep(0.5)  # far more pings than patience: they are answered
            assert both.remote.ready
            for both.well in (False, True):
                while both.remote.ready != both.well:
                    await asyncio.sleep(0.01)
            both.loop.remove_reader(both.front._packets._socket)  # as if it were stopped
            start = monotonic()
            call = both.ask(*affine(1, 1))
            with pytest.raises(RefusedError) as caught:
                await call.told
            assert caught.value.status == 503
            assert 0.1 < monotonic() - start < 5
            assert not both.remote.ready

    run(main())


def test_a_hello_may_be_longer_than_a_packet():
    class Wide(Affine):
        def __init__(self):
            super().__init__()
            self.outputs = {f"an output with a rather long name, number {n}": self.outputs["y"] for n in range(3000)}

    async def main():
        loop = asyncio.get_running_loop()
        signature = signature_of(Wide())
        ours, theirs = pair()
        met = loop.create_future()
        scheduler = RemoteScheduler(MEMORY, Metrics("front"), lambda: None, met.set_result, loop)
        scheduler.connect(ours)
        front = FrontEnd(theirs, types.SimpleNamespace(max_rows=5), signature, lambda: True, loop)
        assert (await met).signature == signature
        assert (scheduler.ready, scheduler.max_rows) == (True, 5)
        scheduler.close()
        front._packets.close()

    run(main())


def test_memory_of_a_burst_is_given_back(monkeypatch):
    monkeypatch.setattr(remote, "_PING_S", 0.02)
    monkeypatch.setattr(remote, "_KEPT_BYTES", MEMORY // 2)

    async def main():
        async with Both(Affine()) as both:
            await both.link()
            shared = both.remote._memory
            for n, kept in ((9, True), (10, False)):
                asked = [both.ask(*affine(20, n)) for _ in range(MEMORY // 512 // 2 + (not kept))]
                for call in asked:
                    check(await call.told, *affine(20, n))
                await asyncio.sleep(0.2)
                assert any(shared) == kept
            check(await both.ask(*affine(20, 3)).told, *affine(20, 3))

    run(main())


def test_a_front_end_that_is_gone_is_cancelled():
    async def main():
        servable = Affine((1,))
        async with Both(servable) as both:
            await both.link()
            servable.gate.clear()
            servable.running.clear()
            for n in range(4):
                both.ask(*affine(1, n))
            while len(both.front._calls) < 4:
                await asyncio.sleep(0.01)
            both.remote._packets.close()
            while both.front._calls:
                await asyncio.sleep(0.01)
            servable.gate.set()
            both.remote = RemoteScheduler(MEMORY, both.metrics, both.wish, lambda said: both.met.set(), both.loop)
            await both.link()
            check(await both.ask(*affine(1, 9)).told, *affine(1, 9))
            assert both.engine_metrics.cancelled == 4

    run(main())


class Raw:
    """The front-end's end of a link, by hand."""

    def __init__(self, both):
        self.both = both
        self.sock, theirs = pair()
        self.sock.setblocking(False)
        both.join(theirs)
        both.ends.append(self.sock)

    async def read(self):
        return await self.both.loop.sock_recv(self.sock, MOST_BYTES)

    async def greet(self, size=MEMORY):
        fd = memory.create(size)
        self.memory = memory.attach(fd)
        socket.send_fds(self.sock, [b"memory"], [fd])
        os.close(fd)
        assert hello.decode(await self.read()).name == self.both.signature.name
        return self

    async def is_closed(self):
        return await asyncio.wait_for(self.read(), 5) == b""


def layout_of(both, rows):
    plan = Plan(
        rows=rows, key=(), sizes={"batch": rows}, cut=False, slices=(), tail_bytes=0, outputs=((0, True), (1, True))
    )
    return descriptors.pack(both.signature, plan)


@pytest.mark.parametrize(
    "packets",
    [
        lambda layout: [b"\x01"],
        lambda layout: [os.urandom(100)],
        lambda layout: [descriptors.run(layout, MEMORY, 1.0)],
        lambda layout: [descriptors.run(layout, (2**32 - 1) << 8, 1.0)],
        lambda layout: [descriptors.run(layout, MEMORY - 256, 1.0)],  # sticks out at the end
        lambda layout: [descriptors.run(layout, 256, 1.0)],  # not where a block of that size starts
        lambda layout: [descriptors.run(layout, 0, 1.0) * 2],  # not free
        lambda layout: [descriptors.run(layout, 0, 1.0)[:-1] + b"\xff"],
        lambda layout: [b"\0" * 200],
        lambda layout: [pickle.dumps(os.getcwd)],
    ],
)
def test_a_bad_descriptor_ends_that_front_end_only(packets, caplog):
    async def main():
        servable = Affine()
        async with Both(servable) as both:
            await both.link()
            raw = await Raw(both).greet()
            servable.gate.clear()
            threading.Timer(0.05, servable.gate.set).start()
            for packet in packets(layout_of(both, 20)):
                raw.sock.send(packet)
            while not await raw.is_closed():
                pass
            check(await both.ask(*affine(2, 3)).told, *affine(2, 3))

    run(main())
    assert "cannot be" in caplog.text


def test_memory_that_could_shrink_is_refused(caplog):
    async def main():
        async with Both(Affine()) as both:
            for size, seals in ((MEMORY, False), (0, True)):
                raw = Raw(both)
                fd = memory.create(size) if seals else os.memfd_create("plain")
                if not seals:
                    os.ftruncate(fd, size)
                with pytest.raises(ServeError):
                    memory.attach(fd)
                socket.send_fds(raw.sock, [b"memory"], [fd])
                os.close(fd)
                assert await raw.is_closed()
            raw = Raw(both)
            raw.sock.send(b"memory")  # without
            assert await raw.is_closed()

    run(main())


@pytest.mark.parametrize(
    "answers",
    [
        lambda block: [b"\x01"],
        lambda block: [descriptors.answer(descriptors.OK, block + 256)],  # nobody asked
        lambda block: [descriptors.answer(descriptors.OK, block)] * 2,
        lambda block: [b"\0" * 64],
        lambda block: [descriptors.refusal(RefusedError(503, "x"), block)[:-1]],
        lambda block: [pickle.dumps(os.getcwd)],
    ],
)
def test_a_bad_answer_is_503_and_a_new_link(answers, caplog):
    async def main():
        async with Both(Affine()) as both:
            ours, theirs = pair()
            both.remote.connect(ours)
            both.ends.append(theirs)
            theirs.send(hello.encode(both.signature, 100))
            await asyncio.wait_for(both.met.wait(), 5)
            call = both.ask(*affine(1, 1))
            for packet in answers(call.block):
                theirs.send(packet)
            with pytest.raises(RefusedError) if len(answers(0)) == 1 else pytest.MonkeyPatch.context():
                await call.told
            while not both.wishes:
                await asyncio.sleep(0.01)
            assert not both.remote.ready
            await both.link()
            check(await both.ask(*affine(2, 3)).told, *affine(2, 3))

    run(main())


def test_entries_stay_whole_and_in_order_when_the_socket_is_full():
    async def main():
        loop = asyncio.get_running_loop()
        ours, theirs = pair()
        got, lost = [], asyncio.Event()
        sender = Packets(ours, lambda packet, fds: None, lambda: None, loop)
        sizes = [1 + (7919 * number) % 3000 for number in range(2000)]  # three megabytes: more than any buffer
        for number, size in enumerate(sizes):
            sender.write(bytes([number % 251]) * size)
            if number % 100 == 0:
                await asyncio.sleep(0)
        assert sender._entries
        receiver = Packets(theirs, lambda packet, fds: got.append(packet), lost.set, loop)
        while sender._entries:
            await asyncio.sleep(0.001)
        sender.close()
        await asyncio.wait_for(lost.wait(), 5)
        assert receiver.closed
        assert max(map(len, got)) <= MOST_BYTES
        assert len(got) < len(sizes) / 10
        assert b"".join(got) == b"".join(bytes([number % 251]) * size for number, size in enumerate(sizes))
        at = 0
        ends = set(np.cumsum(sizes).tolist())
        for packet in got:
            at += len(packet)
            assert at in ends

    run(main())


def test_what_was_sent_before_the_end_arrives():
    async def main():
        loop = asyncio.get_running_loop()
        ours, theirs = pair()
        got, lost = [], asyncio.Event()
        packets = Packets(ours, lambda packet, fds: got.append(packet), lost.set, loop)
        packets.write(b"never read")
        packets.flush()
        for packet in (b"one", b"two", b"three"):
            theirs.send(packet)
        theirs.close()
        await asyncio.wait_for(lost.wait(), 5)
        assert (got, packets.closed) == ([b"one", b"two", b"three"], True)

    run(main())


def test_the_other_end_may_go_at_any_time():
    async def main():
        loop = asyncio.get_running_loop()
        for early in (True, False):  # without and with something unread on the other side
            ours, theirs = pair()
            lost = asyncio.Event()
            packets = Packets(ours, lambda packet, fds: None, lost.set, loop)
            if early:
                theirs.close()
            packets.write(b"x" * 1000)
            await asyncio.sleep(0)
            theirs.close()
            await asyncio.wait_for(lost.wait(), 5)
            packets.write(b"x")
            assert not packets.offer(b"x", [])
            packets.close()
            await asyncio.sleep(0)

    run(main())
