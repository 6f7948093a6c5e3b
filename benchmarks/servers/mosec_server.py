"""mosec (https://github.com/mosecorg/mosec): raw bytes of one row in, raw bytes out, batches of 32 within 2 ms.

    python mosec_server.py --port 8000            the first 10 of 784 numbers, by NumPy

LEPTON_WORKERS is the number of processes that run the model, 1 where it is not given.
With the path of an artifact in LEPTON_ARTIFACT it runs that, as `lx.load` gives it: inputs one after the other in the
body, each one row.
"""

from __future__ import annotations

import os

import numpy as np
from mosec import Server, Worker

ARTIFACT = os.environ.get("LEPTON_ARTIFACT")


class First10(Worker):
    """784 float32 in, the first 10 out."""

    def deserialize(self, data):
        """One row."""
        return np.frombuffer(data, np.float32)

    def serialize(self, data):
        """One row's bytes."""
        return data.tobytes()

    def forward(self, data):
        """A batch of rows."""
        return list(np.stack(data)[:, :10])


class Artifact(Worker):
    """A model of ours."""

    def __init__(self):
        import lepton_xla as lx

        self.model = lx.load(ARTIFACT)
        self.specs = [(name, spec.at({"batch": 1, "seq": 128})) for name, spec in self.model.inputs.items()]
        for size in self.model.buckets["batch"]:
            self.forward([tuple(np.zeros(like.shape[1:], like.dtype) for _, like in self.specs)] * size)

    def deserialize(self, data):
        """A row of each input."""
        rows, start = [], 0
        for _, like in self.specs:
            count = int(np.prod(like.shape))
            rows.append(np.frombuffer(data, like.dtype, count, start).reshape(like.shape[1:]))
            start += count * like.dtype.itemsize
        return tuple(rows)

    def serialize(self, data):
        """A row of the first output."""
        return data.tobytes()

    def forward(self, data):
        """A batch of rows."""
        inputs = {name: np.stack(column) for (name, _), column in zip(self.specs, zip(*data, strict=True), strict=True)}
        return list(next(iter(self.model(**inputs).values())))


if __name__ == "__main__":
    server = Server()
    count = int(os.environ.get("LEPTON_WORKERS", "1"))
    server.append_worker(Artifact if ARTIFACT else First10, num=count, max_batch_size=32, max_wait_time=2)
    server.run()
