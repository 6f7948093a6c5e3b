"""Packets between processes, over a real socket whose two ends are in one."""

import asyncio

import numpy as np
import uvloop

from lepton_xla.serve.processes.packets import MOST_BYTES, Packets, pair


def run(main, timeout=20):
    return asyncio.run(asyncio.wait_for(main, timeout), loop_factory=uvloop.new_event_loop)


def test_entries_stay_whole_and_in_order_when_the_socket_is_full():
    async def main():
        loop = asyncio.get_running_loop()
        ours, theirs = pair()
        got, lost = [], asyncio.Event()
        sender = Packets(ours, lambda packet, fds: None, lambda: None, loop, with_fds=False)
        sizes = [1 + (7919 * number) % 3000 for number in range(2000)]  # three megabytes: more than any buffer
        for number, size in enumerate(sizes):
            sender.write(bytes([number % 251]) * size)
            if number % 100 == 0:
                await asyncio.sleep(0)
        assert sender._entries
        receiver = Packets(theirs, lambda packet, fds: got.append(packet), lost.set, loop, with_fds=False)
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
        packets = Packets(ours, lambda packet, fds: got.append(packet), lost.set, loop, with_fds=False)
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
            packets = Packets(ours, lambda packet, fds: None, lost.set, loop, with_fds=False)
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


def test_a_packet_that_cannot_be_ends_the_connection(caplog):
    async def main():
        ours, theirs = pair()
        lost = asyncio.Event()
        packets = Packets(ours, lambda packet, fds: int(packet), lost.set, asyncio.get_running_loop(), with_fds=False)
        with theirs:
            theirs.send(b"7")
            theirs.send(b"seven")
            await asyncio.wait_for(lost.wait(), 5)
            assert packets.closed
            assert theirs.recv(1) == b""

    run(main())
    assert "invalid packet" in caplog.text
