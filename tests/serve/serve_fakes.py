"""Small servables whose right answers are worked out by NumPy, and a client that speaks raw bytes."""

import asyncio
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np

from lepton_xla.program import TensorSpec
from lepton_xla.serve.http.response import Response


class Ascii:
    """A tokenizer of 128 tokens: a letter each."""

    def encode(self, text):
        return [ord(letter) % 128 for letter in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


class Affine:
    """y = 2 x + n and total = sum of n over nothing: two inputs, two outputs, rows independent.

    A row with n == -1 makes the whole run fail; `gate` holds every run back until it is set; `runs` lists the sizes.
    A run takes long enough for it not to be done on the event loop, which the gate would hold up too.
    """

    name = "affine"
    version = "3"

    def __init__(self, bucket_sizes=(1, 4, 8)):
        self.inputs = {"x": TensorSpec(("batch", 4), "float32"), "n": TensorSpec(("batch",), "int32")}
        self.outputs = {"y": TensorSpec(("batch", 4), "float32"), "twice": TensorSpec(("batch",), "int32")}
        self.buckets = {"batch": tuple(bucket_sizes)}
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()
        self.runs = []
        self.seen = []

    def run(self, sizes, arrays):
        x, n = arrays
        assert x.shape == (sizes["batch"], 4)
        assert n.shape == (sizes["batch"],)
        self.runs.append(sizes["batch"])
        self.seen.append((x.copy(), n.copy()))
        self.running.set()
        time.sleep(3e-4)
        assert self.gate.wait(20)
        if (n == -1).any():
            raise ValueError("/secret/path/of/weights is poisoned")
        return [2 * x + n[:, None].astype(np.float32), 2 * n]


class Tokens:
    """Two symbols: out = tokens + 1 for each token, length = how many tokens are not zero."""

    name = "tokens"
    version = "1"

    def __init__(self):
        self.inputs = {"tokens": TensorSpec(("batch", "seq"), "int32")}
        self.outputs = {"out": TensorSpec(("batch", "seq"), "int32"), "length": TensorSpec(("batch",), "int32")}
        self.buckets = {"batch": (1, 4), "seq": (4, 8)}
        self.runs = []

    def run(self, sizes, arrays):
        (tokens,) = arrays
        assert tokens.shape == (sizes["batch"], sizes["seq"])
        self.runs.append((sizes["batch"], sizes["seq"]))
        return [tokens + 1, (tokens != 0).sum(axis=1, dtype=np.int32)]


class Identity:
    """Gives back its one input of any dtype."""

    name = "identity"
    version = "1"

    def __init__(self, dtype="float32", shape=("batch", 3), bucket_sizes=(1, 8)):
        self.inputs = {"x": TensorSpec(shape, dtype)}
        self.outputs = {"y": TensorSpec(shape, dtype)}
        self.buckets = {"batch": bucket_sizes} if "batch" in shape else {}

    def run(self, sizes, arrays):
        return [arrays[0].copy()]


def start_script(script, *arguments, environment=os.environ, **options):
    """A `subprocess.Popen` of a script that may import this module and the package as it is here."""
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, text=True, env={**environment, "PYTHONPATH": path}, **options)


def connect(server, timeout=10.0):
    """A context manager: a socket to a running server."""
    return contextlib.closing(socket.create_connection(server.address, timeout))


def read_response(sock, method="GET", buffer=None):
    """Reads one response; returns status, lower-case headers, body. `buffer` (a bytearray) keeps what follows."""
    data = bytearray() if buffer is None else buffer

    def more():
        part = sock.recv(65536)
        if not part:
            raise ConnectionError(f"closed after {bytes(data)!r}")
        data.extend(part)

    while b"\r\n\r\n" not in data:
        more()
    head, _, rest = bytes(data).partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    headers = {}
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b": ")
        headers[key.decode().lower()] = value.decode()
    length = 0 if method == "HEAD" or status == 100 else int(headers["content-length"])
    del data[: len(data) - len(rest)]
    while len(data) < length:
        more()
    body = bytes(data[:length])
    del data[:length]
    return status, headers, body


def raw_request(method, path, body=b"", headers=None, version="1.1"):
    """The bytes of a request."""
    fields = {"Host": "test"} | ({"Content-Length": str(len(body))} if body else {}) | (headers or {})
    lines = [f"{method} {path} HTTP/{version}", *(f"{key}: {value}" for key, value in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def exchange(server, method, path, body=b"", headers=None):
    """One request on a connection of its own: status, headers, body."""
    with connect(server) as sock:
        sock.sendall(raw_request(method, path, body, headers))
        return read_response(sock, method)


def counted(server):
    """The counters of the only model of a server."""
    (metrics,) = server.metrics
    return metrics


def label(server, **labels):
    """Sets the labels of `Affine` on a running server."""

    async def on_loop():
        server.models.label("affine", labels)

    asyncio.run_coroutine_threadsafe(on_loop(), server._loop).result(20)


def wait_rows(server, rows, model="affine"):
    """Waits until so many rows are in the queue of a model, for twenty seconds at most."""
    until = time.monotonic() + 20
    line = f'lepton_queue_rows{{model="{model}",version="3"}} {float(rows)}'
    while line not in exchange(server, "GET", "/metrics")[2].decode():
        assert time.monotonic() < until


def affine_json(x, n, **extra):
    """The body of a JSON infer request for `Affine`."""
    x, n = np.asarray(x, np.float32), np.asarray(n, np.int32)
    inputs = [
        {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()},
        {"name": "n", "datatype": "INT32", "shape": list(n.shape), "data": n.tolist()},
    ]
    return json.dumps({"inputs": inputs, **extra}).encode()


def affine_binary(x, n, **extra):
    """The body and headers of a binary infer request for `Affine`, answered binary too."""
    x, n = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(n, np.int32)
    inputs = [
        {"name": "n", "datatype": "INT32", "shape": list(n.shape), "parameters": {"binary_data_size": n.nbytes}},
        {"name": "x", "datatype": "FP32", "shape": list(x.shape), "parameters": {"binary_data_size": x.nbytes}},
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}, **extra}).encode()
    return head + n.tobytes() + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


def read_outputs(headers, body):
    """The outputs of a response as arrays by name, from JSON or binary."""
    dtypes = {"FP32": "<f4", "INT32": "<i4"}
    size = headers.get("inference-header-content-length")
    head = json.loads(body if size is None else body[: int(size)])
    at = len(body) if size is None else int(size)
    arrays = {}
    for output in head["outputs"]:
        dtype = np.dtype(dtypes[output["datatype"]])
        if "data" in output:
            arrays[output["name"]] = np.array(output["data"], dtype).reshape(output["shape"])
        else:
            count = output["parameters"]["binary_data_size"]
            arrays[output["name"]] = np.frombuffer(body[at : at + count], dtype).reshape(output["shape"])
            at += count
    assert at == len(body)
    return arrays


class Scripted:
    """A server that treats each request as the next entry of a script says, the last one over and over.

    Bytes are the answer; None closes the connection; a function is given the socket. `requests` lists what came, as
    (request line and fields, body); `connections` counts.
    """

    def __init__(self, *script):
        self._script = list(script)
        self._lock = threading.Lock()
        self._sockets = []
        self.requests = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for sock in self._sockets:
            sock.close()

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._sockets.append(sock)
            self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
            self._threads[-1].start()

    def _serve(self, sock):
        data = b""
        with contextlib.suppress(OSError):
            while True:
                while b"\r\n\r\n" not in data:
                    part = sock.recv(65536)
                    if not part:
                        return
                    data += part
                head, _, data = data.partition(b"\r\n\r\n")
                length = next(
                    (int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: ")), 0
                )
                while len(data) < length:
                    data += sock.recv(65536)
                with self._lock:
                    self.requests.append((head, data[:length]))
                    entry = self._script.pop(0) if len(self._script) > 1 else self._script[0]
                data = data[length:]
                if entry is None:
                    sock.shutdown(socket.SHUT_RDWR)
                    return
                if callable(entry):
                    entry(sock)
                else:
                    sock.sendall(entry)


def raw_answer(status, body=b"", headers=None):
    """The bytes of an answer."""
    fields = {"Content-Length": str(len(body))} | (headers or {})
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{key}: {value}" for key, value in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def send(exchange, body):
    """Answers without header fields."""
    exchange.send(Response(200, b"\r\n", len(body)), (body,))


def bodies(messages):
    """What answers of `send` hold, in one."""
    return b"".join(message.partition(b"\r\n\r\n")[2] for message in messages)
