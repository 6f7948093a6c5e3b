"""LitServe (https://github.com/Lightning-AI/LitServe): 784 numbers in JSON in, the first 10 out, batches of 32.

JSON, because it sends requests to its workers by pickle, which a request of raw bytes does not survive.

python litserve_server.py --port 8000
"""

from __future__ import annotations

import argparse

import litserve as ls
import numpy as np


class First10(ls.LitAPI):
    """784 float32 in, the first 10 out."""

    def setup(self, device):
        """Nothing to load."""

    def decode_request(self, request):
        """One row."""
        return np.asarray(request["x"], np.float32)

    def batch(self, inputs):
        """Rows to a batch."""
        return np.stack(inputs)

    def predict(self, batch):
        """A batch of rows."""
        return batch[:, :10]

    def unbatch(self, output):
        """A batch to rows."""
        return list(output)

    def encode_response(self, output):
        """One row."""
        return {"y": output.tolist()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    server = ls.LitServer(
        First10(max_batch_size=32, batch_timeout=0.002), accelerator="cpu", workers_per_device=1, fast_queue=True
    )
    server.run(host="127.0.0.1", port=parser.parse_args().port, num_api_servers=1, generate_client_file=False)
