"""A client for servers of the Open Inference Protocol v2: this package's, Triton and others. It does not load JAX.

    with Client("http://127.0.0.1:8000") as client:
        scores = client.infer("digits", image=images)["output"]

`AsyncClient` has the same methods, to be awaited.
"""

from lepton_xla.serve.client.async_client import AsyncClient
from lepton_xla.serve.client.sync_client import Client
from lepton_xla.serve.client.transport import DeadlineError, RequestError

__all__ = ["AsyncClient", "Client", "DeadlineError", "RequestError"]
