"""The OpenAPI 3.1 document of the server, made of the tables it works with.

Paths, methods and scopes are those of `routes.ROUTES`, schemas those of the types that are read and written. Routes
which are always refused are left out. Source: OpenAPI Specification 3.1.0.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from lepton_xla.serve.protocol.auditing import MAX_ENTRIES
from lepton_xla.serve.protocol.generation import Refused
from lepton_xla.serve.protocol.metadata import ErrorMessage
from lepton_xla.serve.protocol.request import InputHead, RequestHead
from lepton_xla.serve.protocol.routes import ROUTES, Route
from lepton_xla.serve.protocol.signature import Signature

_JSON = "application/json"
_BINARY = "application/octet-stream"
_HEADER_LENGTH = "Inference-Header-Content-Length"
_REFERENCE = "#/components/schemas/{name}"
# Errors of any route; infer has more.
_REFUSALS = {
    400: "The request is malformed",
    401: "A token is needed",
    403: "The token is not good for this",
    404: "There is no such model or version",
    405: "The route takes another method",
    408: "The request did not arrive in time",
    409: "What is there stands against it",
    413: "The request is too large",
    429: "The rate of the token or of the model is exceeded",
    431: "The header fields are too large",
    503: "The server cannot take it now; see Retry-After",
    507: "The model is larger than the memory for all",
}
_INFER_REFUSALS = {
    415: "The Content-Encoding is not supported",
    500: "The model failed",
    504: "The timeout passed first",
}


def document(
    signatures: Sequence[Signature], labels: Iterable[str] = (), without: Collection[str] = ()
) -> dict[str, Any]:
    """The document, as JSON values. Paths that no model has a label for are left out.

    Args:
        signatures: of the models. Paths take their names and versions; the example request is for the first.
        labels: of the models.
        without: routes that this server refuses.
    """
    known = {
        "model": list(dict.fromkeys(each.name for each in signatures)),
        "version": list(dict.fromkeys(each.version for each in signatures)),
        "label": sorted(labels),
    }
    served = [route for route in ROUTES if not route.refusal and route.name not in without]
    types = [
        each for route in served for each in (route.request, route.response)
        if each not in (None, bytes) and not isinstance(each, str)
    ]  # fmt: skip
    _, schemas = msgspec.json.schema_components([*types, ErrorMessage, Refused], ref_template=_REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for route in served:
        for path in route.paths:
            names = re.findall(r"{(\w+)}", path)
            if all(known.get(name, True) for name in names):
                operation = _operation(route, path, {name: known.get(name, []) for name in names}, signatures)
                paths.setdefault(path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lepton_xla",
            "version": importlib.metadata.version("lepton-xla"),
            "summary": "Open Inference Protocol v2 with Triton's extension for binary tensors",
        },
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                str(status): _refusal(text, _schema(ErrorMessage))
                for status, text in (_REFUSALS | _INFER_REFUSALS).items()
            },
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "Only where the server asks for tokens."}
            },
        },
    }


def _operation(route: Route, path: str, names: dict[str, list[str]], signatures: Sequence[Signature]) -> dict[str, Any]:
    infer = route.name == "infer"
    parameters: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string"} | ({"enum": values} if values else {"pattern": "^[0-9a-f]{64}$"}),
        }
        for name, values in names.items()
    ]
    if infer:
        parameters += _infer_headers()
    if route.request is bytes:
        start = "Where the piece begins in the file."
        number = {"type": "integer", "minimum": 0}
        parameters.append({"name": "offset", "in": "query", "required": True, "description": start, "schema": number})
    if route.name == "audit":
        most = {"type": "integer", "minimum": 1, "maximum": MAX_ENTRIES}
        parameters.append({"name": "limit", "in": "query", "description": "The most entries.", "schema": most})
    if route.name == "generate_events":
        for name, schema in (("text_input", {"type": "string"}), ("max_tokens", {"type": "integer", "minimum": 1})):
            parameters.append({"name": name, "in": "query", "schema": schema})
    variant = "".join(f"_{name}" for name in names if name != "model") + "_slash" * path.endswith("/")
    operation: dict[str, Any] = {
        "operationId": route.name + variant,
        "summary": route.summary,
        "description": f"Needs a token that is good for `{route.scope}`, where the server asks for tokens.",
        "parameters": parameters,
        "responses": _responses(route, infer=route.name in ("infer", "explain")),
    }
    if route.scope in ("health", "page"):
        operation["description"] = "Needs no token."
        operation["security"] = [{}]
    if route.request is not None:
        binary = {_BINARY: {"schema": {"type": "string", "format": "binary"}}}
        content: dict[str, Any] = binary if route.request is bytes else {_JSON: {"schema": _schema(route.request)}}
        if infer:
            content[_JSON]["examples"] = {"zeros": {"value": _example(signatures[0])}}
            content[_BINARY] = {
                "schema": {"type": "string", "format": "binary"},
                # A string of JSON only is a body of this kind too.
                "examples": {"zeros": {"value": msgspec.json.encode(_example(signatures[0])).decode()}},
            }
        operation["requestBody"] = {"required": infer, "content": content}
    return operation


def _infer_headers() -> list[dict[str, Any]]:
    length = (
        "Bytes of the JSON part; the bytes of tensors follow it. Absent: all of it is JSON. 0: none is, and the body "
        "is one row of the model's only input."
    )
    return [
        {"name": _HEADER_LENGTH, "in": "header", "description": length, "schema": {"type": "integer", "minimum": 0}},
        {
            "name": "Content-Encoding",
            "in": "header",
            "description": "How the body is compressed.",
            "schema": {"enum": ["identity", "gzip", "deflate"]},
        },
    ]


def _responses(route: Route, *, infer: bool) -> dict[str, Any]:
    if route.response is None or isinstance(route.response, str):
        content: dict[str, Any] = {route.response or CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}
    else:
        content = {_JSON: {"schema": _schema(route.response)}}
    good: dict[str, Any] = {"description": "As asked", "content": content}
    if infer:
        content[_BINARY] = {"schema": {"type": "string", "format": "binary"}}
        text = "Bytes of the JSON part, where binary outputs follow it"
        good["headers"] = {_HEADER_LENGTH: {"description": text, "schema": {"type": "integer"}}}
    refusals = _REFUSALS | (_INFER_REFUSALS if infer else {})
    if route.paths[0].startswith("/v1/"):
        # What the route itself refuses is in OpenAI's form; what is refused before it, in ours.
        either = {"anyOf": [_schema(Refused), _schema(ErrorMessage)]}
        return {"200": good} | {str(status): _refusal(text, either) for status, text in refusals.items()}
    responses = {"200": good} | {str(status): {"$ref": f"#/components/responses/{status}"} for status in refusals}
    if route.name.endswith(("live", "ready")):
        responses["503"] = {"description": "Not now", "content": content}
    return dict(sorted(responses.items()))


def _refusal(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {_JSON: {"schema": schema}}}


def _schema(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REFERENCE)
    return schema


def _example(signature: Signature) -> RequestHead:
    """A request of the smallest sizes, all zeros, as far as JSON can carry it."""
    sizes = signature.sizes(1, next(signature.shape_keys()))
    inputs: list[InputHead] = []
    for tensor in signature.sent:
        zeros = np.zeros(tensor.at(sizes), bool).astype(str if tensor.datatype.dtype is None else int)
        data = msgspec.Raw(msgspec.json.encode(zeros.ravel().tolist()))
        inputs.append(InputHead(tensor.name, list(tensor.at(sizes)), tensor.datatype.name, data=data))
    return RequestHead(inputs)
