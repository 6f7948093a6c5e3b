"""The documents of every route except infer: what the server tells about itself and its models.

Each is a type, so that the answers and the OpenAPI document cannot differ. Sources: Open Inference Protocol v2
(metadata, health), Triton's extensions for model configuration, statistics, repository, logging and trace.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.protocol.datatypes import DATATYPES
from lepton_xla.serve.protocol.signature import Signature, Tensor

SERVER_NAME = "lepton_xla"
# Only complete extensions: the repository can be listed but not loaded from, settings read but not changed.
EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "schedule_policy", "statistics")

_LOGGER = logging.getLogger("lepton_xla")
# Other bodies than those of inference are a few settings.
_SMALL_BODY = 1 << 16
# Where Triton's configuration has another name for a datatype.
_TRITON_TYPES = {"BYTES": "TYPE_STRING"}

type Size = Annotated[int, msgspec.Meta(ge=0)]
type Dims = Annotated[list[int], msgspec.Meta(description="-1 is a dimension that varies.")]
type DatatypeName = Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(DATATYPES)})]


class ErrorMessage(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success."""

    error: str


class ServerLive(msgspec.Struct, frozen=True):
    """The process answers."""

    live: bool


class ServerReady(msgspec.Struct, frozen=True):
    """Whether infer requests are taken; `live` is there because the protocol's text calls the field so."""

    ready: bool
    live: bool


class ServerMetadata(msgspec.Struct, frozen=True):
    """What the server is."""

    name: str
    version: str
    extensions: tuple[str, ...]


class ModelReady(msgspec.Struct, frozen=True):
    """Whether a model takes infer requests."""

    name: str
    ready: bool


class TensorMetadata(msgspec.Struct, frozen=True):
    """An input or output, batch dimension included."""

    name: str
    datatype: DatatypeName
    shape: Dims


class ModelMetadata(msgspec.Struct, frozen=True):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class TensorConfig(msgspec.Struct, frozen=True):
    """An input or output as Triton's model configuration writes it, without the batch dimension."""

    name: str
    data_type: Annotated[str, msgspec.Meta(pattern="^TYPE_")]
    dims: Dims


class InputConfig(TensorConfig, frozen=True):
    """An input, which Triton gives a format too: the order of an image's dimensions, where it knows it."""

    format: str = "FORMAT_NONE"


class DynamicBatching(msgspec.Struct, frozen=True):
    """How requests are put together."""

    preferred_batch_size: tuple[int, ...]
    max_queue_delay_microseconds: Size


class VersionPolicy(msgspec.Struct, frozen=True):
    """Which versions are served."""

    specific: dict[str, list[str]]


class ModelConfig(msgspec.Struct, frozen=True):
    """Triton's model configuration, as far as it means something here."""

    name: str
    platform: str
    backend: str
    version_policy: VersionPolicy
    max_batch_size: Annotated[int, msgspec.Meta(ge=0, description="0: requests are never put together.")]
    input: list[InputConfig]
    output: list[TensorConfig]
    dynamic_batching: DynamicBatching | msgspec.UnsetType = msgspec.UNSET


class Duration(msgspec.Struct, frozen=True):
    """How often, and nanoseconds of it all."""

    count: Size
    ns: Size


class InferStatistics(msgspec.Struct, frozen=True):
    """Where the time of infer requests went."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchStatistics(msgspec.Struct, frozen=True):
    """Executions of one compiled size."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(msgspec.Struct, frozen=True):
    """The statistics of one model; every figure only ever grows."""

    name: str
    version: str
    last_inference: Annotated[int, msgspec.Meta(ge=0, description="Milliseconds since 1970; 0: none yet.")]
    inference_count: Annotated[int, msgspec.Meta(ge=0, description="Rows, padding not counted.")]
    execution_count: Size
    inference_stats: InferStatistics
    batch_stats: list[BatchStatistics]
    memory_usage: list[dict[str, Any]]
    response_stats: dict[str, Any]


class Statistics(msgspec.Struct, frozen=True):
    """The statistics of every model asked for."""

    model_stats: list[ModelStatistics]


class IndexRequest(msgspec.Struct, frozen=True):
    """What to list of the repository."""

    ready: Annotated[bool, msgspec.Meta(description="Whether to list ready models only.")] = False


class IndexEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A version of a model of the repository; of a model of which nothing was loaded only the name."""

    name: str
    version: str = ""
    state: Literal["READY", "UNAVAILABLE", "LOADING", "UNLOADING", ""] = ""
    reason: str = ""


class LoadParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to load a model."""

    config: Annotated[
        str | None,
        msgspec.Meta(
            description="JSON of a model configuration, of which `max_batch_size` and `dynamic_batching` are taken, "
            'such as {"max_batch_size": 8}. It holds until the model is loaded again.'
        ),
    ] = None


class LoadRequest(msgspec.Struct, frozen=True):
    """What to load of a model: what the repository asks for."""

    parameters: LoadParameters = LoadParameters()


class UnloadParameters(msgspec.Struct, frozen=True):
    """How to unload a model."""

    unload_dependents: Annotated[bool, msgspec.Meta(description="No model depends on another.")] = False


class UnloadRequest(msgspec.Struct, frozen=True):
    """Which model to unload is in the path."""

    parameters: UnloadParameters = UnloadParameters()


class Done(msgspec.Struct, frozen=True):
    """It is done."""


class LogSettings(msgspec.Struct, frozen=True):
    """What is logged, to stderr."""

    log_file: str
    log_info: bool
    log_warning: bool
    log_error: bool
    log_verbose_level: int
    log_format: str


class TraceSettings(msgspec.Struct, frozen=True):
    """Triton's traces to files, of which there are none: `traceparent` headers carry traces on instead."""

    trace_file: str
    trace_level: tuple[str, ...]
    trace_rate: str
    trace_count: str
    log_frequency: str


def server_metadata(name: str, *, repository: bool = False) -> ServerMetadata:
    """The answer to `GET /v2`; the extension of the repository is told of where models can be loaded from one."""
    extensions = (*EXTENSIONS, *(("model_repository",) if repository else ()))
    return ServerMetadata(name, importlib.metadata.version("lepton-xla"), extensions)


def model_metadata(signature: Signature, versions: list[str]) -> ModelMetadata:
    """The answer to `GET /v2/models/{model}`."""

    def described(tensors: tuple[Tensor, ...]) -> list[TensorMetadata]:
        return [TensorMetadata(tensor.name, tensor.sent.name, _dims(tensor)) for tensor in tensors]

    return ModelMetadata(
        name=signature.name,
        versions=versions,
        platform="jax_xla",
        inputs=described(signature.sent),
        outputs=described(signature.outputs),
    )


def model_config(signature: Signature, max_delay_s: float) -> ModelConfig:
    """The answer to `GET /v2/models/{model}/config`."""
    skip = 0 if signature.batch is None else 1

    def described[T: TensorConfig](kind: type[T], tensors: tuple[Tensor, ...]) -> list[T]:
        return [
            kind(tensor.name, _TRITON_TYPES.get(tensor.sent.name, f"TYPE_{tensor.sent.name}"), _dims(tensor)[skip:])
            for tensor in tensors
        ]

    batching: DynamicBatching | msgspec.UnsetType = msgspec.UNSET
    if signature.batch is not None:
        batching = DynamicBatching(signature.bucket_sizes, round(max_delay_s * 1e6))
    return ModelConfig(
        name=signature.name,
        platform="jax_xla",
        backend=SERVER_NAME,
        version_policy=VersionPolicy({"versions": [signature.version]}),
        max_batch_size=0 if signature.batch is None else signature.bucket_sizes[-1],
        input=described(InputConfig, signature.sent),
        output=described(TensorConfig, signature.outputs),
        dynamic_batching=batching,
    )


def index_request(body: bytes) -> IndexRequest:
    """What a request for the index asks for: an `IndexRequest`, or nothing.

    Raises:
        HTTPError: 400 for another body, 413 for one far too large.
    """
    return _parsed(body, IndexRequest, 'such as {"ready": true}')


def load_overrides(body: bytes) -> dict[str, int | None]:
    """What a request to load a model sets: the `max_batch_size` and `max_delay_us` of its configuration.

    Raises:
        HTTPError: 400 for a configuration that sets anything else, or another body; 413 for one far too large.

    >>> load_overrides(b'{"parameters": {"config": "{\\\\"max_batch_size\\\\": \\\\"16\\\\"}"}}')
    {'max_batch_size': 16}
    """
    text = _parsed(body, LoadRequest, 'such as {"parameters": {"config": "..."}}').parameters.config
    if text is None:
        return {}
    try:
        config = msgspec.convert(msgspec.json.decode(text.encode()), _Overrides, strict=False)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
        raise HTTPError(400, f"its config can set max_batch_size and dynamic_batching only: {error}") from error
    found = {"max_batch_size": config.max_batch_size}
    if config.dynamic_batching is not None:
        found["max_delay_us"] = config.dynamic_batching.max_queue_delay_microseconds
    return {name: value for name, value in found.items() if value is not None}


def check_unload(body: bytes) -> None:
    """Checks the body of a request to unload a model.

    Raises:
        HTTPError: 400 if it is no `UnloadRequest`, 413 if it is far too large.
    """
    _parsed(body, UnloadRequest, 'such as {"parameters": {"unload_dependents": false}}')


class _DelayOverride(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_queue_delay_microseconds: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] | None = None


class _Overrides(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_batch_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] | None = None
    dynamic_batching: _DelayOverride | None = None


def _parsed[T: (IndexRequest, LoadRequest, UnloadRequest)](body: bytes, kind: type[T], such_as: str) -> T:
    if len(body) > _SMALL_BODY:
        raise HTTPError(413, f"the body of this request may have {_SMALL_BODY} bytes")
    try:
        return msgspec.json.decode(body, type=kind) if body.strip() else kind()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPError(400, f"the body must be empty or an object {such_as}: {error}") from error


def repository_index(models: Iterable[tuple[Signature, bool]], body: bytes) -> list[IndexEntry]:
    """The answer to `POST /v2/repository/index` where models are served that are in no repository.

    Args:
        models: the signature of each, and whether it takes requests.
        body: an `IndexRequest`, or nothing.

    Raises:
        HTTPError: see `index_request`.
    """
    asked = index_request(body)
    return [
        IndexEntry(signature.name, signature.version, "READY")
        if ready
        else IndexEntry(signature.name, signature.version, "UNAVAILABLE", "it takes no requests now")
        for signature, ready in models
        if ready or not asked.ready
    ]


def log_settings() -> LogSettings:
    """The answer to `GET /v2/logging`."""
    return LogSettings(
        log_file="",
        log_info=_LOGGER.isEnabledFor(logging.INFO),
        log_warning=_LOGGER.isEnabledFor(logging.WARNING),
        log_error=_LOGGER.isEnabledFor(logging.ERROR),
        log_verbose_level=int(_LOGGER.isEnabledFor(logging.DEBUG)),
        log_format="ISO8601",
    )


def trace_settings() -> TraceSettings:
    """The answer to `GET /v2/trace/setting`."""
    return TraceSettings(trace_file="", trace_level=("OFF",), trace_rate="0", trace_count="0", log_frequency="0")


def _dims(tensor: Tensor) -> list[int]:
    return [-1 if isinstance(dim, str) else dim for dim in tensor.shape]
