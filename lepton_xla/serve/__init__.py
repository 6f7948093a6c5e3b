"""Serving one loaded model over the Open Inference Protocol v2, with dynamic batching onto its compiled sizes."""

from typing import TYPE_CHECKING

from lepton_xla.deferred import exports

if TYPE_CHECKING:
    from lepton_xla.serve.app.options import Options
    from lepton_xla.serve.client import AsyncClient, Client
    from lepton_xla.serve.limits import Limits
    from lepton_xla.serve.protocol.signature import LoadedModel
    from lepton_xla.serve.server import Server, serve

__all__ = ["AsyncClient", "Client", "Limits", "LoadedModel", "Options", "Server", "serve"]

# Where each name lives. Nothing is imported before it is asked for, because a client needs no JAX.
_HOMES = {
    "app.options": ("Options",),
    "client": ("AsyncClient", "Client"),
    "limits": ("Limits",),
    "protocol.signature": ("LoadedModel",),
    "server": ("Server", "serve"),
}

if not TYPE_CHECKING:  # else every misspelt name would have a type
    __getattr__, __dir__ = exports(__name__, _HOMES)
