"""Serving one loaded model over the Open Inference Protocol v2, with dynamic batching onto its compiled sizes."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lepton_xla.serve.app.options import Options
    from lepton_xla.serve.client import AsyncClient, Client
    from lepton_xla.serve.limits import Limits
    from lepton_xla.serve.protocol.signature import LoadedModel
    from lepton_xla.serve.server import Server, serve

__all__ = ["AsyncClient", "Client", "Limits", "LoadedModel", "Options", "Server", "serve"]

# Where each name lives. Nothing is imported before it is asked for, because a client needs no JAX.
_HOME = {
    "AsyncClient": "client",
    "Client": "client",
    "Limits": "limits",
    "LoadedModel": "protocol.signature",
    "Options": "app.options",
    "Server": "server",
    "serve": "server",
}

if not TYPE_CHECKING:  # else every misspelt name would have a type

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"lepton_xla.serve.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
