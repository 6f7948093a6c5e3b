"""Output of several processes as one."""

import asyncio
import io

from lepton_xla.launch.logs import Lines, pump


def pumped(*chunks, rank=3, colour=False):
    out = io.BytesIO()

    async def main():
        source = asyncio.StreamReader()
        task = asyncio.create_task(pump(source, rank, Lines(out, colour=colour)))
        for chunk in chunks:
            source.feed_data(chunk)
            await asyncio.sleep(0)
        source.feed_eof()
        await task

    asyncio.run(main())
    return out.getvalue()


def test_lines_are_whole_and_labelled():
    assert pumped(b"on", b"e\ntwo\n", b"last") == b"[3] one\n[3] two\n[3] last\n"
    assert pumped(b"one\n", rank=None) == b"one\n"
    assert pumped(b"one\n", colour=True) == b"\x1b[32m[3]\x1b[0m one\n"
    assert pumped(b"\xff\n\n") == b"[3] \xff\n[3] \n"


def test_of_a_progress_bar_the_last_state_is_shown():
    assert pumped(b"1 %\r50 %\r100 %\nend\r\n") == b"[3] 100 %\n[3] end\n"


def test_a_line_without_end_is_not_kept_for_ever():
    out = pumped(*[b"x" * 50_000] * 4)
    assert len(out) == 200_000 + out.count(b"[3] ") * 5
    assert out.count(b"\n") == 2


def test_a_stream_that_cannot_be_written_is_given_up():
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    lines = Lines(Full(), colour=False)
    lines.write(0, b"lost")
    lines.write(0, b"lost too")
    assert lines.error.errno == 28
