"""Requests to generate: Triton's and KServe's generate extension, and OpenAI's completions.

A model without a tokenizer takes token ids where texts are expected, and answers with `token_ids` beside empty texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import msgspec

from lepton_xla.generation.sampling import Sampling
from lepton_xla.serve.errors import HTTPError, shortened
from lepton_xla.serve.protocol.jsondata import PIECE_BYTES
from lepton_xla.serve.protocol.prompts import MARK, cut_prompts

type Ids = list[int]
# Names by which clients of other servers send what `Sampling` has.
_ALIASES = {
    "stop_words": "stop",
    "random_seed": "seed",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "stop_token_ids": "end_tokens",
    "ignore_eos": "ignore_end",
    "beam_width": "num_beams",
}
# What asks for nothing that is not done anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words": ("", [], None),
    "stream": (True, False, 1, 0, None),  # numbers in queries
    "details": (True, False, 1, 0, None),
    "n": (1, None),
    "best_of": (1, None),
    "echo": (False, None),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
}
_MAX_FIELDS = 64
# The id of the last event for an EventSource, which asks again when a stream has ended, and tells the last id.
ENDED = b"ended"
_IGNORED = frozenset({"user", "model", "prompt", "messages", "stream_options", "metadata", "store", "id"})


class GenerateRequest(msgspec.Struct, kw_only=True):
    """Body of `generate` and `generate_stream`. Fields of `parameters` may also stand beside it."""

    text_input: str | None = None
    input_ids: Ids | None = None
    id: str = ""
    parameters: dict[str, Any] = {}


class GenerateResponse(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Answer of `generate`, and each event of `generate_stream`, whose last one says why the sequence ended."""

    model_name: str
    model_version: str
    id: str = ""
    text_output: str | None = None
    token_ids: Ids | None = None
    details: dict[str, Any] | None = None


class StreamOptions(msgspec.Struct):
    """Of OpenAI's requests."""

    include_usage: bool | None = False


class _Named(msgspec.Struct):
    """What all of OpenAI's requests have."""

    model: str


class CompletionRequest(_Named, kw_only=True):
    """Body of `/v1/completions`; further fields are those of `Sampling`, by OpenAI's names."""

    prompt: str | list[int | str | Ids]
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class TextPart(msgspec.Struct, tag_field="type", tag="text"):
    """A part of a message."""

    text: str


class Message(msgspec.Struct):
    """A message of a chat; of several texts, each begins a line."""

    role: str
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatRequest(_Named, kw_only=True):
    """Body of `/v1/chat/completions`; further fields are those of `Sampling`, by OpenAI's names."""

    messages: list[Message]
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class Usage(msgspec.Struct):
    """Tokens that were read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(msgspec.Struct, kw_only=True):
    """Answer of both of OpenAI's routes, and each event of their streams."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage | None = None


class ModelEntry(msgspec.Struct, kw_only=True):
    """A model, as OpenAI's clients list it."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "lepton_xla"


class ModelList(msgspec.Struct, kw_only=True):
    """Answer of `/v1/models`."""

    object: str = "list"
    data: list[ModelEntry]


class Refusal(msgspec.Struct, kw_only=True):
    """Why a request was refused, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Refused(msgspec.Struct):
    """Body of an error of the routes below `/v1`."""

    error: Refusal


class Asked[T](NamedTuple):
    """A request of OpenAI's form.

    Attributes:
        model: the model that it names.
        request: the request, and all of its fields; or why there is none.
    """

    model: str
    request: tuple[T, dict[str, Any]] | HTTPError


def read_asked[T](body: bytes, kind: type[T]) -> Asked[T]:
    """Decode a body of OpenAI's form, as `read` does.

    Raises:
        HTTPError: 400 for what is not JSON, not UTF-8, or names no model; 413 as `read`.
    """
    body, prompts = _cut(body, kind)
    model = model_of(body)
    try:
        return Asked(model, _decoded(body, prompts, kind))
    except HTTPError as refusal:
        return Asked(model, refusal.bare())


def read[T](body: bytes, kind: type[T]) -> tuple[T, dict[str, Any]]:
    """Decode a body; give the request, and all of its fields. Prompts of a long one are read in pieces.

    Raises:
        HTTPError: 400 for what is not JSON, not UTF-8, or lacks a field; of a long body also for too much beside the
            prompts. 413 for more prompts than any model takes.
    """
    return _decoded(*_cut(body, kind), kind)


def _cut(body: bytes, kind: Any) -> tuple[bytes, dict[str, list[Any]]]:
    """The body without its array of prompts, if it is long, and that by name."""
    if len(body) <= PIECE_BYTES:
        return body, {}
    name = "input_ids" if kind is GenerateRequest else "prompt"
    body, found = cut_prompts(body, name)
    return body, {} if found is None else {name: found}


def _decoded[T](body: bytes, prompts: dict[str, list[Any]], kind: type[T]) -> tuple[T, dict[str, Any]]:
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
        request = msgspec.convert(fields, kind)
        for name, found in prompts.items():
            if getattr(request, name, None) == MARK:
                setattr(request, name, found)
        return request, fields
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPError(400, f"the request is not as it should be: {shortened(str(error))}") from error


def model_of(body: bytes) -> str:
    """The model that a body of OpenAI's form names; of the rest nothing is kept.

    Raises:
        HTTPError: 400 for what is not JSON, not UTF-8, or names no model.

    >>> model_of(b'{"prompt": [1, 2, 3], "model": "letters"}')
    'letters'
    """
    try:
        return msgspec.json.decode(body, type=_Named).model
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPError(400, f"the request is not as it should be: {shortened(str(error))}") from error


def read_query(target: bytes) -> tuple[GenerateRequest, dict[str, Any]]:
    """Read the query of a request target; give the request, and its further fields.

    Values are JSON where they are JSON and texts otherwise; `input_ids` are numbers separated by commas, and `stop` may
    come several times.

    Raises:
        HTTPError: 400 for what is not UTF-8, comes twice, or is no number where one is needed.

    >>> request, fields = read_query(b"/?text_input=12+hours&max_tokens=5&stop=.&stop=7")
    >>> request.text_input, fields
    ('12 hours', {'stop': ['.', '7'], 'max_tokens': 5})
    """
    query = target.partition(b"?")[2].decode("latin-1")
    try:
        given = parse_qs(query, keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict")
    except ValueError as error:
        raise HTTPError(400, "the query is not UTF-8, or has too many fields") from error
    fields: dict[str, Any] = {"stop": given.pop("stop")} if "stop" in given else {}
    request = GenerateRequest()
    for name, values in given.items():
        if len(values) > 1:
            raise HTTPError(400, f"the query has {shortened(name)} {len(values)} times")
        (value,) = values
        if name in ("text_input", "id"):
            setattr(request, name, value)
        elif name == "input_ids":
            try:
                request.input_ids = [int(part) for part in value.split(",")]
            except ValueError as error:
                raise HTTPError(400, "input_ids are not numbers separated by commas") from error
        else:
            try:
                fields[name] = msgspec.json.decode(value)
            except (msgspec.MsgspecError, RecursionError):
                fields[name] = value
    return request, fields


def sampling_of(fields: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Sampling:
    """The sampling that a request asks for.

    Args:
        fields: by name, also by those of other servers.
        defaults: of fields that are not there.

    Raises:
        HTTPError: 400 for a field that is unknown, of a wrong type, or asks for what is not implemented.

    >>> sampling_of({"max_tokens": 5, "stop": "END", "n": 1}).stop
    ('END',)
    """
    found, known_as = dict(defaults or {}), dict[str, str]()
    for given, value in fields.items():
        name = _ALIASES.get(given, given)
        if name in _NEUTRAL:
            if not any(type(value) is type(each) and value == each for each in _NEUTRAL[name]):  # 0 is not false
                raise HTTPError(400, f"{given} = {shortened(value)} is not supported")
        elif name in Sampling.__struct_fields__:
            if value is not None:  # as if it were not there
                wanted = [value] if name == "stop" and isinstance(value, str) else value
                if known_as.setdefault(name, given) != given and found[name] != wanted:
                    raise HTTPError(400, f"{known_as[name]} and {given} are the same, and have different values")
                found[name] = wanted
        elif name not in _IGNORED:
            raise HTTPError(400, f"unknown parameter {shortened(given)}")
    if found.get("stop") == [""]:  # how Triton's clients ask for none
        del found["stop"]
    try:
        return msgspec.convert(found, Sampling)
    except msgspec.ValidationError as error:
        raise HTTPError(400, f"the parameters are not as they should be: {shortened(str(error))}") from error


def chat_text(messages: list[Message]) -> str:
    """The prompt of a chat: a line `role: content` for each message, and the beginning of the answer's.

    >>> chat_text([Message("user", "Hello")])
    'user: Hello\\nassistant:'
    """
    return "".join(f"{message.role}: {message.text}\n" for message in messages) + "assistant:"


def event(value: Any, event_id: bytes = b"") -> bytes:
    """One server-sent event, with an id if one is given."""
    head = b"id: " + event_id + b"\n" if event_id else b""
    return head + b"data: " + (value if isinstance(value, bytes) else msgspec.json.encode(value)) + b"\n\n"
