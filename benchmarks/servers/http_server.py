"""HTTP and nothing else: httptools on uvloop, the same 10 floats for an answer to every request.

    python http_server.py --port 8000

What a server written in Python on httptools has left to lose: nothing in it looks at path, header or body.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import httptools
import numpy as np
import uvloop

ROW = np.random.default_rng(0).random(784, np.float32)[:10].tobytes()
HEAD = json.dumps(
    {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 10], "parameters": {"binary_data_size": len(ROW)}}]}
).encode()
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n"
    + f"Inference-Header-Content-Length: {len(HEAD)}\r\nContent-Length: {len(HEAD) + len(ROW)}\r\n\r\n".encode()
    + HEAD
    + ROW
)


class Same(asyncio.Protocol):
    """Answers every request with the same bytes."""

    def connection_made(self, transport: Any) -> None:
        """A connection, and its parser."""
        self.transport, self.parser = transport, httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        """Parses."""
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Answers."""
        self.transport.write(ANSWER)


async def main(port: int) -> None:
    """Listens, prints its port, runs until it is ended."""
    server = await asyncio.get_running_loop().create_server(Same, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    uvloop.run(main(parser.parse_args().port))
