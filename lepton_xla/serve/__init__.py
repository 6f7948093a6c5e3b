"""Serving one loaded model over the Open Inference Protocol v2, with dynamic batching onto its compiled sizes."""

from lepton_xla.serve.limits import Limits
from lepton_xla.serve.server import Options, Server, serve
from lepton_xla.serve.signature import Servable

__all__ = ["Limits", "Options", "Servable", "Server", "serve"]
