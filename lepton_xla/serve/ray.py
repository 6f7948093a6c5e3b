"""The server as a Ray Serve application: replicas on a Ray cluster, behind Ray's proxy.

    serve run lepton_xla.serve.ray:application artifact=digits.lepton replicas=2

Each replica runs the whole server, with its batching, on a Unix socket, and passes requests on to it as they are. So
clients of the Open Inference Protocol work through Ray's proxy too. Needs the extra `ray`.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import msgspec

from lepton_xla.environment.extras import Needs
from lepton_xla.errors import ServeError
from lepton_xla.serve.client.async_client import PooledChannel
from lepton_xla.serve.client.endpoint import endpoint
from lepton_xla.serve.client.transport import Answer, RequestError, connected

# Fields that belong to one connection (RFC 9110, section 7.6.1), and those that are written anew.
_OWN = (b"host", b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"transfer-encoding", b"content-length")
_LONGEST_PROBE_S = 5.0


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `application` takes.

    Attributes:
        artifact: the artifact, on every node.
        replicas: how many.
        cpus: cores that each replica gets.
        max_ongoing_requests: requests of a replica at once; the server batches them. More wait in Ray's proxy.
        name: the model's name in URLs; by default the artifact's.
    """

    artifact: str
    replicas: Annotated[int, msgspec.Meta(ge=1)] = 1
    cpus: Annotated[float, msgspec.Meta(ge=0, le=1 << 20)] = 1.0
    max_ongoing_requests: Annotated[int, msgspec.Meta(ge=1)] = 256
    name: str | None = None


def application(args: Mapping[str, Any]) -> Any:
    """Make the application; see `Settings` for its arguments.

    Raises:
        ServeError: for arguments that it does not take.
        MissingPackageError: if Ray Serve is not installed.

    >>> application({"artefact": "digits.lepton"})
    Traceback (most recent call last):
    lepton_xla.errors.ServeError: the Ray application's arguments: Object contains unknown field `artefact`
    """
    try:
        # `serve run` gives all values as text, a file as they are.
        settings = msgspec.convert(dict(args), Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ServeError(f"the Ray application's arguments: {error}") from error
    with Needs("ray", "a Ray application"):
        serve = importlib.import_module("ray.serve")
    deployment = serve.deployment(
        name="lepton",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        ray_actor_options={"num_cpus": settings.cpus},
        health_check_period_s=5,
    )(Replica)
    return deployment.bind(settings.artifact, settings.name)


class Replica:
    """One server, in an actor of Ray."""

    def __init__(self, artifact: str, name: str | None = None) -> None:
        from lepton_xla.compiler import load
        from lepton_xla.serve.app.options import Options
        from lepton_xla.serve.server import Server

        self._folder = tempfile.mkdtemp(prefix="lepton-")
        socket = os.path.join(self._folder, "http.sock")
        options = Options(unix_socket=pathlib.Path(socket), name=name)
        self._server = Server(load(artifact), options).start()
        self._there = endpoint(f"http+unix://{quote(socket, safe='')}")
        self._idle: list[PooledChannel] = []

    async def __call__(self, request: Any) -> Any:
        """Pass on an HTTP request, and its answer back."""
        responses = importlib.import_module("starlette.responses")
        body = await request.body()
        fields = [(name, value) for name, value in request.headers.raw if name.lower() not in _OWN]
        path = request.scope["raw_path"] + (
            b"?" + request.scope["query_string"] if request.scope["query_string"] else b""
        )
        lines = [request.method.encode() + b" " + path + b" HTTP/1.1", b"Host: lepton"]
        lines += [name + b": " + value for name, value in fields]
        lines += [b"Content-Length: %d" % len(body)] if body or request.method in ("POST", "PUT") else []
        try:
            answer = await self._exchange(b"\r\n".join([*lines, b"", body]))
        except (OSError, RequestError):
            return responses.JSONResponse({"error": "the server of this replica does not answer"}, 503)
        kept = {name.decode(): value.decode("latin-1") for name, value in answer.headers.items() if name not in _OWN}
        return responses.Response(answer.body, answer.status, kept)

    async def check_health(self) -> None:
        """Ray asks this, and replaces the replica if it raises."""
        async with asyncio.timeout(_LONGEST_PROBE_S):
            answer = await self._exchange(self._there.request("GET", "/v2/health/live"))
        if answer.status != 200:
            raise ServeError("the server of this replica is not alive")

    def __del__(self) -> None:
        if hasattr(self, "_server") and not sys.is_finalizing():
            self._server.stop()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _exchange(self, request: bytes) -> Answer:
        channel = next((each for each in iter(self._pooled, None) if each.open), None)
        if channel is None:
            channel = await connected(PooledChannel, self._there)
        try:
            answer = await channel.exchange(request)
        except BaseException:
            channel.abort()
            raise
        if channel.open:
            self._idle.append(channel)
        return answer

    def _pooled(self) -> PooledChannel | None:
        return self._idle.pop() if self._idle else None
