"""Chaos: requests as no honest client sends them, then health and right answers; and memory over a million requests.

    python tests/serve/chaos.py [--requests 10000] [--endurance 1000000] [--serve-option=--workers=2]

Starts `leptonx serve` on a small artifact of its own. Ends with 0 if nothing was found; each finding is a line.
`test_chaos.py` runs the short form.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import pathlib
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator

import numpy as np
import psutil

WIDTH = 16
INFER = "/v2/models/chaos/infer"
# What clients may be told, whatever they send. 503 is for too many of them at once.
ALLOWED = {200, 400, 401, 404, 405, 408, 413, 414, 415, 417, 426, 429, 431, 501, 503, 505}
LEAKS = re.compile(rb"Traceback|File \"|/lepton_xla/|/tmp/|0x[0-9a-f]{8}")
AT_ONCE = 64
# Limits that the storm is to meet.
FLAGS = (
    "--head-timeout-s=2",
    "--body-timeout-s=2",
    "--write-timeout-s=2",
    "--idle-timeout-s=4",
    "--max-body-bytes=200000",
)


def artifact(folder: pathlib.Path) -> pathlib.Path:
    """A model whose right answers are easy: the row, twice."""
    import lepton_xla as lx

    weights = {"kernel": 2 * np.eye(WIDTH, dtype=np.float32)}
    inputs = {"x": lx.TensorSpec(("batch", WIDTH), "float32")}
    program = lx.trace(lambda weights, x: {"y": x @ weights["kernel"]}, weights, inputs)
    path = folder / "chaos.lepton"
    lx.compile(program, {"batch": (1, 8, 32)}, name="chaos").save(path)
    return path


@contextlib.contextmanager
def served(path: pathlib.Path, *options: str) -> Iterator[tuple[psutil.Process, int]]:
    """The process of a running server and its port."""
    command = [sys.executable, "-m", "lepton_xla", "serve", str(path), "--port", "0", "--json", *FLAGS, *options]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                raise RuntimeError(log.read().decode()[-2000:])
            yield psutil.Process(process.pid), json.loads(line)["port"]
        finally:
            process.terminate()
            process.wait(30)


def infer_request(rows: np.ndarray, extra: str = "") -> bytes:
    """A good request, binary both ways."""
    size = {"binary_data_size": rows.nbytes}
    given = {"name": "x", "shape": list(rows.shape), "datatype": "FP32", "parameters": size}
    wanted = {"name": "y", "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [given], "outputs": [wanted]}).encode()
    body = head + rows.tobytes()
    lines = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{extra}"
    return f"{lines}Inference-Header-Content-Length: {len(head)}\r\n\r\n".encode() + body


GOOD = infer_request(np.ones((1, WIDTH), np.float32))


# Each gives what to send, in pieces with pauses between, and how to leave: "read", "half" (shut down writing, then
# read), "reset" or "leave" (close without reading).
type Act = tuple[list[bytes], float, str]


def malformed(dice: random.Random) -> Act:
    """A good request with some bytes changed, cut out or put in."""
    data = bytearray(GOOD)
    for _ in range(dice.randint(1, 8)):
        at = dice.randrange(min(len(data), 260))
        match dice.randrange(3):
            case 0:
                data[at] = dice.randrange(256)
            case 1:
                del data[at : at + dice.randint(1, 9)]
            case _:
                data[at:at] = dice.choice(
                    (b"\r\n", b"\0", b"[" * 50, b"-1", b"99999999999999999999", b"\xff\xfe", b";")
                )
    return [bytes(data)], 0.0, dice.choice(("half", "reset", "leave"))


def garbage(dice: random.Random) -> Act:
    """What is no HTTP at all."""
    start = dice.choice(
        (b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET")
    )
    return [start + dice.randbytes(dice.randint(1, 2000))], 0.0, dice.choice(("half", "leave"))


def slow(dice: random.Random) -> Act:
    """A request that comes in drops, and sometimes not to its end."""
    parts = sorted(dice.sample(range(1, len(GOOD)), 4))
    pieces = [GOOD[a:b] for a, b in zip([0, *parts], [*parts, len(GOOD)], strict=True)]
    return pieces[: dice.randint(1, 5)], dice.choice((0.01, 0.05)), dice.choice(("read", "half", "leave"))


def oversized(dice: random.Random) -> Act:
    """More than the server takes: a body, a length, header fields, chunks, rows."""
    rows = np.zeros((2000, WIDTH), np.float32)
    declared = (
        f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {dice.choice((10**7, 10**12, 10**30))}\r\n\r\n".encode()
    )
    fields = "".join(f"X-{n}: {'a' * 500}\r\n" for n in range(dice.choice((30, 100))))
    chunked = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    data = dice.choice((
        infer_request(np.zeros((5000, WIDTH), np.float32)),
        infer_request(rows),
        declared + b"x" * 1000,
        infer_request(np.ones((1, WIDTH), np.float32), fields),
        chunked + b"1\r\nx\r\n" * 3000,
        chunked + b"fffffffffffffff\r\nx",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ))  # fmt: skip
    return [data], 0.0, dice.choice(("half", "leave", "reset"))


def nonsense(dice: random.Random) -> Act:
    """Good HTTP that asks for what there is not."""
    head = {"inputs": [{"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "data": [0.0] * WIDTH}]}
    given = head["inputs"][0]
    match dice.randrange(8):
        case 0:
            given["shape"] = dice.choice(([-1, WIDTH], [2**62, WIDTH], [WIDTH], [], [1, WIDTH, 1], ["1", WIDTH]))
        case 1:
            given["datatype"] = dice.choice(("FP64", "BYTES", "", "INT4", 7))
        case 2:
            given["data"] = dice.choice(([], [[[[]]]], ["a"] * WIDTH, [1e400] * WIDTH, None, {"a": 1}, [0.0] * 17))
        case 3:
            given["name"] = dice.choice(("y", "", "../x", "x\r\nX-A: b", "\x1b[31m", "x" * 10_000))
        case 4:
            given["parameters"] = {dice.choice(("binary_data_size", "shared_memory_region", "classification")): "a"}
        case 5:
            head["outputs"] = dice.choice(([{"name": "z"}], [{"name": "y"}] * 2, [{}], 5))
        case 6:
            head["parameters"] = {
                dice.choice(("triton_a", "timeout", "priority", "sequence_id")): dice.choice((-1, "x", 2**70))
            }
        case _:
            head["inputs"] = [given, given]
    body = json.dumps(head).encode()
    path = dice.choice(
        (INFER, INFER, INFER, "/v2/models/../infer", "/v2/models/%2e%2e/infer", "/v2/nothing", "/%00", "//")
    )
    method = dice.choice(("POST", "POST", "POST", "DELETE", "TRACE", "PUT"))
    lines = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return [lines.encode() + body], 0.0, "read"


def hasty(dice: random.Random) -> Act:
    """Many good requests at once, whose answers are not waited for."""
    return [GOOD * dice.randint(1, 40)], 0.0, dice.choice(("reset", "leave", "half"))


ACTS: tuple[Callable[[random.Random], Act], ...] = (malformed, garbage, slow, oversized, nonsense, hasty)


async def act(
    port: int, kind: Callable[[random.Random], Act], dice: random.Random, found: collections.Counter[str]
) -> None:
    """Plays one client; what it must not be told goes into `found` with an exclamation mark."""
    pieces, pause, leave = kind(dice)
    data = b""
    try:
        async with asyncio.timeout(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    if pause:
                        await asyncio.sleep(pause)
                if leave == "reset":
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                elif leave != "leave":
                    if leave == "half":
                        writer.write_eof()
                    data = await reader.read(2_000_000)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except OSError:
        found["connection ended by the server"] += 1
        return
    except TimeoutError:
        found[f"! {kind.__name__}: no end after 20 s"] += 1
        return
    for status in map(int, re.findall(rb"HTTP/1\.1 (\d{3}) ", data)):
        found[str(status) if status in ALLOWED else f"! {kind.__name__}: status {status}"] += 1
    if LEAKS.search(data):
        found[f"! {kind.__name__}: the answer tells of the inside: {data[:300]!r}"] += 1


async def storm(port: int, count: int, seed: int) -> collections.Counter[str]:
    """Plays `count` clients, `AT_ONCE` at a time; what came of them."""
    found: collections.Counter[str] = collections.Counter()
    dice = random.Random(seed)
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(kind: Callable[[random.Random], Act], own: random.Random) -> None:
        async with gate:
            await act(port, kind, own, found)

    await asyncio.gather(*(one(dice.choice(ACTS), random.Random(dice.random())) for _ in range(count)))
    return found


def still_right(port: int) -> list[str]:
    """What is wrong with health and answers afterwards."""
    wrong = []
    for path in ("live", "ready"):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/{path}", timeout=10) as answer:
            if answer.status != 200:
                wrong.append(f"health/{path} says {answer.status}")
    rows = np.random.default_rng(0).normal(size=(50, WIDTH)).astype(np.float32)
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(infer_request(rows, "Connection: close\r\n"))
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    got = np.frombuffer(data[-rows.nbytes :], np.float32).reshape(rows.shape)
    if not np.array_equal(got, 2 * rows):
        wrong.append(f"the answer is wrong: {data[:200]!r}")
    return wrong


def memory(process: psutil.Process) -> int:
    """Bytes of the server and what it started."""
    return sum(each.memory_full_info().uss for each in (process, *process.children(recursive=True)))


def endurance(process: psutil.Process, port: int, count: int) -> list[str]:
    """Memory after `count` good requests over that after a hundredth of them."""
    from lepton_xla.serve.client.endpoint import endpoint
    from lepton_xla.serve.load.generator import generate
    from lepton_xla.serve.load.result import Load

    target = endpoint(f"http://127.0.0.1:{port}")
    done, early, errors = 0, 0, 0
    while done < count:
        seconds = 0.5 if done < count // 100 else 5.0
        result = generate(target, GOOD, Load(rate=None, connections=64, seconds=seconds, warmup_s=0.0, timeout_s=10.0))
        done, errors = done + len(result.status), errors + result.errors
        if not early and done >= count // 100:
            early = memory(process)
            print(f"{early / 1e6:.1f} MB after {done:,} requests", flush=True)
    late = memory(process)
    print(f"{late / 1e6:.1f} MB after {done:,} requests, {errors} errors", flush=True)
    wrong = [f"{errors} of {done} good requests failed"] if errors else []
    return wrong + ([f"memory grew from {early:,} to {late:,} bytes"] if late > 1.05 * early else [])


def run(requests: int, seed: int, endurance_requests: int, options: tuple[str, ...] = ()) -> list[str]:
    """Everything that was found."""
    with tempfile.TemporaryDirectory() as folder, served(artifact(pathlib.Path(folder)), *options) as (process, port):
        wrong = still_right(port)
        start = time.monotonic()
        found = asyncio.run(storm(port, requests, seed))
        print(f"{requests} clients in {time.monotonic() - start:.0f} s: {dict(sorted(found.items()))}", flush=True)
        wrong += [f"{count} times {what[2:]}" for what, count in found.items() if what.startswith("!")]
        if not process.is_running():
            return [*wrong, "the server is gone"]
        wrong += still_right(port)
        if endurance_requests:
            wrong += endurance(process, port, endurance_requests)
    return wrong


def main() -> int:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="clients of the storm")
    parser.add_argument("--endurance", type=int, default=0, help="good requests over which memory is watched")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve-option", action="append", default=[], help="for leptonx serve, such as --workers=2")
    options = parser.parse_args()
    wrong = run(options.requests, options.seed, options.endurance, tuple(options.serve_option))
    for line in wrong:
        print(f"FOUND: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
