"""The routes as data: what is served where, who may ask, and what goes in and out.

One table routes requests, tells the guard what a token has to be good for, and is what the OpenAPI document is made
of. Sources: Open Inference Protocol v2, and Triton's extensions to it.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal
from urllib.parse import unquote

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.protocol import adjustment, auditing, generation, metadata, monitoring, traffic, uploads
from lepton_xla.serve.protocol.request import RequestHead
from lepton_xla.serve.protocol.response import ResponseHead

type Scope = Literal["health", "page", "read", "infer", "admin"]

_NO_SHARED_MEMORY = "shared memory is not supported: send tensors in the body of the request"
_NO_SETTING = "settings cannot be changed while the server runs"


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """One row of the table.

    Attributes:
        name: what it is called here and, as `operationId`, in the OpenAPI document.
        method: GET, which HEAD goes with, POST, PUT or DELETE.
        path: with `{parameters}`, and a part in brackets that may be left out; it may have alternatives, by `|`.
        scope: what a token has to be good for; health and the files of the page need no token.
        summary: one line for readers.
        request: type of the JSON body, if it takes one; `bytes` for another body.
        response: type of the JSON answer; a media type for a text of another kind; None for metrics.
        refusal: why it is not to be had, for a route that clients know and this server always refuses.
        status: of that refusal.
    """

    name: str
    method: str
    path: str
    scope: Scope
    summary: str
    request: Any = None
    response: Any = None
    refusal: str = ""
    status: int = 501

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path it is found at: without what is in brackets, and with each alternative."""
        found = _OPTIONAL.search(self.path)
        if found is None:
            return (self.path,)
        before, after = self.path[: found.start()], self.path[found.end() :]
        return tuple(f"{before}{part}{after}" for part in ("", *found[1].split("|")))


_OPTIONAL = re.compile(r"\[([^]]*)\]")
_MODEL = "/v2/models/{model}[/versions/{version}|/labels/{label}]"

ROUTES: tuple[Route, ...] = (
    Route("server_live", "GET", "/v2/health/live", "health", "Whether the process answers",
          response=metadata.ServerLive),
    Route("server_ready", "GET", "/v2/health/ready", "health", "Whether infer requests are taken; 503 if not",
          response=metadata.ServerReady),
    Route("server_metadata", "GET", "/v2[/]", "read", "Name, version and extensions of the server",
          response=metadata.ServerMetadata),
    Route("openapi", "GET", "/v2/openapi.json", "read", "This document", response=dict[str, Any]),
    Route("metrics", "GET", "/metrics", "read", "Metrics in Prometheus' text format"),
    Route("model_metadata", "GET", _MODEL, "read", "Inputs and outputs of a model",
          response=metadata.ModelMetadata),
    Route("model_ready", "GET", f"{_MODEL}/ready", "read", "Whether a model takes infer requests; 503 if not",
          response=metadata.ModelReady),
    Route("model_config", "GET", f"{_MODEL}/config", "read", "A model's configuration, in Triton's words",
          response=metadata.ModelConfig),
    Route("model_statistics", "GET", f"{_MODEL}/stats", "read", "What a model did so far",
          response=metadata.Statistics),
    Route("statistics", "GET", "/v2/models/stats", "read", "What every model did so far",
          response=metadata.Statistics),
    Route("infer", "POST", f"{_MODEL}/infer", "infer", "Runs a model",
          request=RequestHead, response=ResponseHead),
    Route("explain", "POST", "/v2/models/{model}/explain", "infer",
          "Runs the model NAME-explain, which says what inputs a class comes from (compile --explain)",
          request=RequestHead, response=ResponseHead),
    Route("generate", "POST", f"{_MODEL}/generate", "infer", "Continues a text or token ids",
          request=generation.GenerateRequest, response=generation.GenerateResponse),
    Route("generate_stream", "POST", f"{_MODEL}/generate_stream", "infer",
          "The same, as a server-sent event for each token", request=generation.GenerateRequest,
          response="text/event-stream"),
    Route("generate_events", "GET", f"{_MODEL}/generate_stream", "infer",
          "The same for an EventSource: fields of the request in the query", response="text/event-stream"),
    Route("completions", "POST", "/v1/completions", "infer", "Continues texts, in OpenAI's form",
          request=generation.CompletionRequest, response=generation.Completion),
    Route("chat_completions", "POST", "/v1/chat/completions", "infer", "Continues a chat, in OpenAI's form",
          request=generation.ChatRequest, response=generation.Completion),
    Route("generators", "GET", "/v1/models", "read", "The models that generate, in OpenAI's form",
          response=generation.ModelList),
    Route("model_feedback", "POST", f"{_MODEL}/feedback", "infer", "The right answers of earlier requests",
          request=monitoring.FeedbackRequest, response=monitoring.FeedbackTaken),
    Route("model_monitor", "GET", f"{_MODEL}/monitor", "read", "Drift of a model's data, and its accuracy by feedback",
          response=monitoring.ModelMonitor),
    Route("alerts", "GET", "/v2/alerts", "read", "Alert rules, and which of them fire", response=monitoring.Alerts),
    Route("repository_index", "POST", "/v2/repository/index", "read", "The models there are",
          request=metadata.IndexRequest, response=list[metadata.IndexEntry]),
    Route("audit", "GET", "/v2/audit", "admin", "Who changed what, the latest last; ?limit= says how many at most",
          response=list[auditing.AuditEntry]),
    Route("log_settings", "GET", "/v2/logging", "read", "What is logged", response=metadata.LogSettings),
    Route("trace_settings", "GET", "/v2/trace/setting", "read", "What is traced", response=metadata.TraceSettings),
    Route("model_trace_settings", "GET", "/v2/models/{model}/trace/setting", "read", "What is traced of a model",
          response=metadata.TraceSettings),
    Route("set_logging", "POST", "/v2/logging", "admin", "Changes what is logged",
          refusal=_NO_SETTING, status=405),
    Route("set_tracing", "POST", "/v2/trace/setting", "admin", "Changes what is traced",
          refusal=_NO_SETTING, status=405),
    Route("set_model_tracing", "POST", "/v2/models/{model}/trace/setting", "admin", "Changes what is traced of a model",
          refusal=_NO_SETTING, status=405),
    Route("load", "POST", "/v2/repository/models/{model}/load", "admin", "Loads a model, or anew if it has changed",
          request=metadata.LoadRequest, response=metadata.Done),
    Route("unload", "POST", "/v2/repository/models/{model}/unload", "admin", "Unloads a model",
          request=metadata.UnloadRequest, response=metadata.Done),
    Route("repository_models", "GET", "/v2/repository/models", "read", "Versions and labels in the repository",
          response=list[uploads.ModelOnDisk]),
    Route("upload_sizes", "POST", "/v2/repository/blobs", "admin", "How much of each file has been sent",
          request=uploads.SizesRequest, response=uploads.Sizes),
    Route("upload_piece", "PUT", "/v2/repository/blobs/{sha256}", "admin",
          "Sends a piece of a file, which begins at `offset`; 409 if another number of bytes has been sent",
          request=bytes, response=uploads.Piece),
    Route("publish", "POST", "/v2/repository/models/{model}/versions[/{version}]", "admin",
          "Makes a version of files that were sent", request=uploads.PublishRequest, response=uploads.Published),
    Route("remove_version", "DELETE", "/v2/repository/models/{model}/versions/{version}", "admin",
          "Removes a version, on which no label may stand", response=uploads.Removed),
    Route("move_label", "POST", "/v2/repository/models/{model}/labels/{label}", "admin",
          "Moves a label to a version, or back", request=uploads.LabelRequest, response=uploads.Moved),
    Route("show_traffic", "GET", "/v2/models/{model}/traffic", "read",
          "How requests that name no version are shared, and the figures of the versions that take part",
          response=traffic.TrafficShown),
    Route("set_traffic", "PUT", "/v2/models/{model}/traffic", "admin", "Shares requests among versions",
          request=traffic.Traffic, response=traffic.TrafficShown),
    Route("clear_traffic", "DELETE", "/v2/models/{model}/traffic", "admin", "Sends all requests to one version again",
          response=traffic.TrafficShown),
    Route("show_rollout", "GET", "/v2/models/{model}/rollout", "read", "The last rollout of a model",
          response=traffic.Rollout),
    Route("start_rollout", "PUT", "/v2/models/{model}/rollout", "admin",
          "Has a version take the place of the stable one in stages, as long as it does well",
          request=traffic.RolloutRequest, response=traffic.Rollout),
    Route("stop_rollout", "DELETE", "/v2/models/{model}/rollout", "admin",
          "Stops a rollout: the stable version answers all requests again", response=traffic.Rollout),
    Route("show_adjustment", "GET", "/v2/models/{model}/adjustment", "read", "The last adjustment of a model",
          response=adjustment.Adjustment),
    Route("start_adjustment", "PUT", "/v2/models/{model}/adjustment", "admin",
          "Has the weights of a model move in steps towards those of an artifact that was sent",
          request=adjustment.AdjustmentRequest, response=adjustment.Adjustment),
    Route("stop_adjustment", "DELETE", "/v2/models/{model}/adjustment", "admin",
          "Stops an adjustment: the last step goes on serving", response=adjustment.Adjustment),
    Route("page", "GET", "/ui[/]", "page", "The page for people", response="text/html"),
    Route("page_script", "GET", "/ui/ui.js", "page", "Its script", response="text/javascript"),
    Route("page_figures", "GET", "/ui/figures.js", "page", "What the metrics say", response="text/javascript"),
    Route("page_drawing", "GET", "/ui/drawing.js", "page", "How figures are drawn", response="text/javascript"),
    Route("page_explain", "GET", "/ui/explain.js", "page", "What an answer comes from", response="text/javascript"),
    Route("page_traffic", "GET", "/ui/traffic.js", "page", "Traffic and rollouts", response="text/javascript"),
    Route("page_style", "GET", "/ui/ui.css", "page", "Its style sheet", response="text/css"),
    *(
        Route(f"{kind}_shared_memory_{action}", method, f"/v2/{kind}sharedmemory{path}/{action}", "admin",
              f"Shared memory: {action}", refusal=_NO_SHARED_MEMORY)
        for kind in ("system", "cuda")
        for action, method, path in (
            ("status", "GET", "[/region/{region}]"),
            ("register", "POST", "/region/{region}"),
            ("unregister", "POST", "[/region/{region}]"),
        )
    ),
)  # fmt: skip

CHANGES = frozenset({"repository_models", "upload_sizes", "upload_piece", "publish", "remove_version", "move_label"})
"""Routes of the folder of a repository."""

TRAFFIC = frozenset({"show_traffic", "set_traffic", "clear_traffic", "show_rollout", "start_rollout", "stop_rollout"})
"""Routes of how requests are shared among the versions of a model."""

ADJUSTMENT = frozenset({"show_adjustment", "start_adjustment", "stop_adjustment"})
"""Routes of weights that move in steps."""

CONTROL = CHANGES | TRAFFIC | ADJUSTMENT | {"load", "unload"}
"""Routes that only a server of a repository has; others refuse them."""

OPEN_PATHS = frozenset(path.encode() for route in ROUTES if route.scope == "health" for path in route.paths)
"""Answered whatever the limits say, without a token."""
TOKENLESS_PATHS = OPEN_PATHS | {path.encode() for route in ROUTES if route.scope == "page" for path in route.paths}

_ANY = "{}"
_ORIGIN = re.compile(rb"https?://[^/?#]+(?=/)", re.IGNORECASE)


class _Node:
    """A place in the tree of path segments."""

    __slots__ = ("children", "parameter", "routes")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.parameter = ""
        self.routes: dict[str, Route] = {}


def _plant() -> _Node:
    root = _Node()
    for route in ROUTES:
        for path in route.paths:
            node = root
            for segment in path[1:].split("/"):
                name = segment[1:-1] if segment.startswith("{") else ""
                node = node.children.setdefault(_ANY if name else segment, _Node())
                node.parameter = name
            node.routes[route.method] = route
            if route.method == "GET":
                node.routes["HEAD"] = route
    return root


_ROOT = _plant()


def find(method: bytes, target: bytes) -> tuple[Route, dict[str, str]]:
    """The route of a request, and its path parameters.

    Args:
        method: such as `b"GET"`.
        target: the request target, percent-encoded, query included.

    Raises:
        HTTPError: 400 for a target that is no path, 404 where there is no such path, 405 where it takes another
            method.

    >>> route, parameters = find(b"GET", b"/v2/models/digits/ready")
    >>> parameters
    {'model': 'digits'}
    """
    path = target.partition(b"?")[0]
    if path == b"*" and method == b"OPTIONS":
        raise HTTPError(405, "most routes of this server take GET, HEAD or POST", "Allow: GET, HEAD, POST")
    if not path.startswith(b"/"):
        # The absolute form, which clients send to proxies and every server has to accept (RFC 9112, section 3.2.2).
        origin = _ORIGIN.match(path)
        if origin is None:
            raise HTTPError(400, "the request target is neither a path nor a URL")
        path = path[origin.end() :]
    node, parameters = _ROOT, dict[str, str]()
    for segment in path[1:].split(b"/"):
        # Decoded after splitting: an encoded slash is part of a name, not a separator.
        text = unquote(segment.decode("latin-1"), errors="replace")
        # A name never stands for a parameter's segment, not even one that is spelled like its mark.
        child = node.children.get(text) if text != _ANY else None
        if child is None:
            child = node.children.get(_ANY) if text else None
            if child is None:
                raise HTTPError(404, "no such route")
            parameters[child.parameter] = text
        node = child
    if not node.routes:
        raise HTTPError(404, "no such route")
    route = node.routes.get(method.decode("latin-1"))
    if route is None:
        allowed = sorted(name for name, known in node.routes.items() if known.status != 405)
        raise HTTPError(405, f"this route takes {' or '.join(allowed)}", f"Allow: {', '.join(allowed)}")
    return route, parameters
