"""Log lines: what they say, and that neither clients nor slow readers can hurt the server by them."""

import io
import json
import logging
import os
import re
import subprocess
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_fakes import affine_json, connect, raw_request, read_response, start_script

from lepton_xla.serve.observe.logs import JsonLines, PlainLines, Repeats, Throttle, Writer

INFER = "/v2/models/affine/infer"


def record(message, *args, level=logging.ERROR, **extra):
    made = logging.LogRecord("lepton_xla.serve", level, "x.py", 1, message, args, None)
    vars(made).update(extra)
    return made


def test_lines_are_one_a_record_and_keep_their_fields():
    fields = {"route": "/v2/models/{model}/infer", "error": 'a\nb "c"', "rows": 3, "request_id": "\x1b[31m\x9b\u202e"}
    one = record("a\nb \x1b[31m %s", "c\r", fields=fields)
    line = JsonLines().format(one)
    assert line.isprintable()
    read = json.loads(line)
    assert read["message"] == "a\nb \x1b[31m c\r"
    assert read.items() >= fields.items()
    assert (read["level"], read["logger"]) == ("error", "lepton_xla.serve")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", read["time"])
    plain = PlainLines().format(one)
    assert plain.isprintable()
    assert 'route=/v2/models/{model}/infer error="a\\nb \\"c\\"" rows=3 request_id="' in plain


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 3)), max_size=200))
def test_a_throttle_tells_no_more_than_its_burst_and_accounts_for_all(events):
    now = [0.0]
    throttle = Throttle(burst=3, period_s=10.0, clock=lambda: now[0])
    told, left_out, asked = {}, {}, {}
    for wait, kind in events:
        now[0] += wait
        asked[kind] = asked.get(kind, 0) + 1
        answer = throttle.ask(kind)
        if answer is not None:
            told.setdefault(kind, []).append(now[0])
            left_out[kind] = left_out.get(kind, 0) + answer
    for kind, times in told.items():
        # Periods do not slide: at the border of two of them twice the burst may come.
        assert max(sum(start <= each < start + 10.0 for each in times) for start in times) <= 6
        assert asked[kind] >= len(times) + left_out[kind]
    now[0] += 10.0
    for kind in asked:
        last = throttle.ask(kind)
        assert asked[kind] == len(told[kind]) + left_out[kind] + last


def test_the_kinds_that_a_throttle_remembers_are_bounded():
    throttle = Throttle()
    for kind in range(10_000):
        assert throttle.ask(kind) == 0
    assert len(throttle._kinds) <= 256


def test_repeated_messages_are_left_out_and_counted():
    now = [0.0]
    repeats = Repeats(Throttle(burst=10, period_s=10.0, clock=lambda: now[0]))
    passed = [repeats.filter(record("client %d did it", n)) for n in range(1000)]
    assert passed == [True] * 10 + [False] * 990
    assert repeats.filter(record("something else"))
    assert repeats.filter(record("client %d did it", 1, level=logging.WARNING))
    now[0] = 11.0
    again = record("client %d did it", 5, fields={"status": 500})
    assert repeats.filter(again)
    assert again.fields == {"status": 500, "left_out": 990}


def test_a_reader_that_does_not_read_holds_up_nobody():
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream, os.fdopen(read) as reader:
        writer = Writer(stream)
        writer.setFormatter(PlainLines())
        start = time.monotonic()
        for n in range(20_000):
            writer.emit(record("line %d %s", n, "x" * 100))
        assert time.monotonic() - start < 10
        come = lost = 0
        last = ""
        while "last" not in last:
            last = reader.readline()
            if found := re.search(r"(\d+) lines were lost", last):
                lost += int(found[1])
            elif "last" not in last:
                come += 1
            if come == 1000:  # reading has made room: the next line tells what was lost before it
                writer.emit(record("last"))
        assert come + lost == 20_000
        assert lost > 5000
        for _ in range(10_000):
            if not writer._lines.qsize():
                break
            reader.readline()
        writer.close()


def test_what_is_queued_is_written_at_the_end():
    stream = io.StringIO()
    writer = Writer(stream)
    writer.setFormatter(PlainLines())
    for n in range(100):
        writer.emit(record("line %d", n))
    writer.close()
    assert stream.getvalue().count("\n") == 100


def lost(writer, count):
    """Waits until so many lines are lost."""
    until = time.monotonic() + 20
    while writer._lost < count:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_full_disk_loses_lines_and_the_next_that_is_written_says_how_many(tmp_path):
    """/dev/full is a disk without room; then the same descriptor is a file."""
    file = tmp_path / "log"
    with open("/dev/full", "w") as stream, file.open("w") as other:
        writer = Writer(stream)
        writer.setFormatter(PlainLines())
        for n in range(5):
            writer.emit(record("line %d", n))
        lost(writer, 5)
        os.dup2(other.fileno(), stream.fileno())
        for n in range(5, 8):
            writer.emit(record("line %d", n))
        writer.close()
    lines = file.read_text().splitlines()
    assert [line.split("ERROR ")[-1] for line in lines if "ERROR" in line] == ["line 5", "line 6", "line 7"]
    assert sum("5 lines were lost: No space left on device" in line for line in lines) == 1
    assert len(lines) == 4


def test_a_full_pipe_that_does_not_block_is_waited_for():
    read, write = os.pipe()
    os.set_blocking(write, False)
    with os.fdopen(write, "w") as stream, os.fdopen(read) as reader:
        writer = Writer(stream)
        writer.setFormatter(PlainLines())
        for n in range(3000):
            writer.emit(record("line %d %s", n, "x" * 100))
        time.sleep(0.05)
        assert writer._lines.qsize() > 1000  # the pipe is full
        assert [int(reader.readline().split()[4]) for _ in range(3000)] == list(range(3000))
        writer.close()


def test_a_pipe_that_nobody_reads_any_more_ends_it():
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        writer = Writer(stream)
        writer.setFormatter(PlainLines())
        os.close(read)
        writer.emit(record("line"))
        writer._thread.join(5)
        assert not writer._thread.is_alive()
        writer.emit(record("line"))
        assert not writer._lines.qsize()  # and holds nothing for it


SCRIPT = """
    import sys
    from serve_fakes import Affine
    from lepton_xla.serve import Options, Server
    from lepton_xla.serve.observe.logs import configure

    configure(as_json=True)
    options = Options(port=0, access_log_sample=float(sys.argv[1]))
    Server(Affine((1,)), options).run(on_ready=lambda server: print(server.address[1], flush=True))
"""


class Running:
    """A server in a process of its own."""

    def __init__(self, share):
        self.process = start_script(SCRIPT, share, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.address = ("127.0.0.1", int(self.process.stdout.readline()))

    def stop(self):
        self.process.terminate()
        _, errors = self.process.communicate(timeout=20)
        assert self.process.returncode == 0
        return [json.loads(line) for line in errors.splitlines()]


@pytest.fixture
def run():
    started = []

    def make(share=0.0):
        started.append(Running(share))
        return started[-1]

    yield make
    for each in started:
        each.process.kill()
        each.process.communicate()


def test_a_flood_of_bad_requests_makes_a_few_lines(run):
    server = run()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with connect(server) as sock:
        for n in range(300):
            body = affine_json(np.full((1, 4), 123.25), [-1] if n % 2 else [7, 7], id=f"id-{n}\n")
            sock.sendall(
                raw_request("POST", INFER, body, {"Traceparent": trace, "Authorization": "Bearer s3cr3t-t0k3n"})
            )
            assert read_response(sock)[0] == (500 if n % 2 else 400)
            sock.sendall(raw_request("GET", f"/private/{n}?token=hunter2"))
            assert read_response(sock)[0] == 404
    lines = server.stop()
    refused = [line for line in lines if line["message"] == "request refused"]
    assert {status: sum(line["status"] == status for line in refused) for status in (400, 404, 500)} == {
        400: 10, 404: 10, 500: 10,
    }  # fmt: skip
    assert len(lines) < 60
    failed = next(line for line in refused if line["status"] == 500)
    assert failed.items() >= {
        "level": "warning", "method": "POST", "route": "/v2/models/{model}/infer", "request_id": "id-1\n",
        "trace_id": trace[3:35], "error": "inference failed",
    }.items()  # fmt: skip
    text = json.dumps(lines)
    for secret in ("s3cr3t", "hunter2", "private", "123.25"):
        assert secret not in text


def test_an_access_log_that_nobody_reads_does_not_stop_the_server(run):
    server = run(share=1.0)
    with connect(server) as sock:
        for _ in range(3000):  # each some 200 bytes, into a pipe of 64 KiB
            sock.sendall(raw_request("GET", "/v2/health/live"))
            assert read_response(sock)[0] == 200
    lines = server.stop()
    access = [line for line in lines if line["logger"] == "lepton_xla.serve.access"]
    assert len(access) == 3000
    assert {(line["route"], line["status"]) for line in access} == {("/v2/health/live", 200)}
