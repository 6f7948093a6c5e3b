"""Answers requests to generate, whole or token by token as server-sent events."""

from __future__ import annotations

import dataclasses
import secrets
import weakref
from collections.abc import Callable
from time import monotonic, time
from typing import Any

import msgspec

from lepton_xla.errors import InputError, LeptonError
from lepton_xla.generation.rows import text_of_tokens
from lepton_xla.generation.sampling import Sampling
from lepton_xla.generation.slots import Generation
from lepton_xla.serve.batching.decoding import Decoding
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.http.response import Response, respond
from lepton_xla.serve.http.workers import Workers
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.models.registry import Registry
from lepton_xla.serve.models.split import BY_ID
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.protocol import generation
from lepton_xla.serve.protocol.generation import Asked, Completion, GenerateResponse, event
from lepton_xla.serve.protocol.jsondata import PIECE_BYTES
from lepton_xla.serve.protocol.monitoring import MAX_ID

type Refuse = Callable[[Exchange, HTTPError], None]
_EVENTS = "text/event-stream", "Cache-Control: no-cache"
# What a request may take beside the prompt, and bytes of JSON that a token of the prompt may take.
_BODY_BYTES, _TOKEN_BYTES = 64 << 10, 512
# Characters and token ids of prompts that are read on the event loop, which takes milliseconds.
_AT_ONCE = 4096


@dataclasses.dataclass(eq=False)
class _Choice:
    """One sequence of a request, what feedback calls it (empty if nobody can), and what has come of it."""

    sequence: Generation
    id: str = ""
    tokens: int = 0
    last_s: float = 0.0


class _Answer:
    """The answer of one request while it comes; `Cancellable`.

    Args:
        exchange: gets it.
        decoding: runs its sequences.
        model: whose metrics count, and whose replies are told of.
        codes: counts HTTP answers.
        refuse: answers with an error.
        write: `write(choice, token, text)` gives the events of a token, or of the end (token None); None for an
            answer as a whole.
        whole: gives the body of an answer as a whole, of all choices; the last events of a stream.
        workers: read what is long.
        request_id: what feedback calls it, with the number of the prompt behind a slash if there are several.
        mirror: `mirror(version, sequence)` has another version asked the same.
    """

    def __init__(
        self,
        exchange: Exchange,
        decoding: Decoding,
        model: ModelHandle,
        codes: Any,
        refuse: Refuse,
        write: Callable[[int, Generation, int | None, str], bytes] | None,
        whole: Callable[[list[Generation]], bytes],
        workers: Workers,
        request_id: str,
        mirror: Callable[[str, Generation], object],
    ) -> None:
        self._mirror = mirror
        self._workers, self._id = workers, request_id
        self._exchange, self._decoding, self._metrics = exchange, decoding, model.metrics
        self._replies = model.replies
        self._codes, self._refuse, self._write, self._whole = codes, refuse, write, whole
        self._choices: list[_Choice] = []
        self._left = 0

    def start(self, prompts: list[Any], sampling: Sampling) -> None:
        """Checks all prompts, and then begins. Long texts become tokens on another thread, and it begins later.

        Raises:
            HTTPError: 400 for a prompt or a value that is refused, 503 if too many wait.
        """
        engine = self._decoding.engine

        def make() -> list[Generation]:
            try:
                return [engine.sequence(prompt, sampling) for prompt in prompts]
            except InputError as error:
                raise HTTPError(400, str(error)) from error

        if sum(len(prompt) for prompt in prompts if isinstance(prompt, str | list)) <= _AT_ONCE:
            self._begin(make())
        else:
            self._workers.read(self._exchange, make, self._begin, self._refuse)

    def _begin(self, made: list[Generation]) -> None:
        self._left = len(made)
        self._exchange.work = self
        try:
            for index, sequence in enumerate(made):

                def told(_: Generation, token: int | None, text: str, index: int = index) -> None:
                    self._told(index, token, text)

                sequence.told = told
                self._decoding.submit(sequence)
                called = f"{self._id}/{index}" if self._id and len(made) > 1 else self._id
                self._choices.append(_Choice(sequence, called, last_s=self._exchange.started_s))
            if self._write is not None:
                self._exchange.begin(200, *_EVENTS)
                self._codes[200] += 1
        except HTTPError:
            self._write = None  # nothing more is to be told
            self.cancel()
            raise

    def cancel(self) -> None:
        """The client went away: its slots are free for the next step."""
        for choice in self._choices:
            self._decoding.cancel(choice.sequence)

    def _told(self, index: int, token: int | None, text: str) -> None:
        """A sequence has another token, or has ended."""
        choice, now, metrics = self._choices[index], monotonic(), self._metrics
        if token is not None:
            (metrics.next_token_s if choice.tokens else metrics.first_token_s).observe(now - choice.last_s)
            choice.tokens += 1
            choice.last_s = now
            metrics.generated_tokens += 1
            metrics.last_s = time()
        else:
            self._left -= 1
            metrics.prompt_tokens += len(choice.sequence.prompt)
            if choice.sequence.finish == "cancelled":
                metrics.generations_cancelled += 1
            elif choice.sequence.finish == "failed":
                metrics.failures += 1
            else:
                metrics.generations += 1
                self._ended(choice)
        exchange = self._exchange
        failed = choice.sequence.finish == "failed" and token is None
        if self._write is not None:
            if failed:
                exchange.write(event({"error": "generation failed"}))
            else:
                exchange.write(self._write(index, choice.sequence, token, text))
            if not self._left:
                exchange.write(self._whole([each.sequence for each in self._choices]))
                exchange.end()
                if all(each.sequence.finish in ("stop", "length") for each in self._choices):
                    self._codes[200] -= 1  # counted with the model's from now on
                    metrics.answered(now - exchange.started_s, len(exchange.body), 0)
        elif failed:
            self._refuse(exchange, HTTPError(500, "generation failed"))
            self.cancel()
        elif not self._left and not exchange.answered:
            body = self._whole([each.sequence for each in self._choices])
            metrics.answered(now - exchange.started_s, len(exchange.body), len(body))
            exchange.answer(200, body)

    def _ended(self, choice: _Choice) -> None:
        """A sequence has ended by itself."""
        drawn = self._exchange.choice
        if self._replies is not None:
            propensity = 0.0 if drawn is None else drawn[0]
            self._replies.answered(choice.id, choice.sequence, _text_of(choice.sequence), propensity)
        if drawn is not None and drawn[1] is not None:
            self._mirror(drawn[1], choice.sequence)


class GenerationPages:
    """Routes of generation.

    Args:
        models: the models served.
        metrics: the server's counters.
        limits: the bounds on a request.
        refuse: answers with an error.
        workers: read what is long.
    """

    def __init__(
        self, models: Registry, metrics: ServerMetrics, limits: Limits, refuse: Refuse, workers: Workers
    ) -> None:
        self._workers = workers
        self._models, self._metrics, self._limits, self._refuse = models, metrics, limits, refuse
        self._decodings: weakref.WeakKeyDictionary[ModelHandle, Decoding] = weakref.WeakKeyDictionary()
        self._shadows: weakref.WeakSet[ModelHandle] = weakref.WeakSet()  # those that continue a prompt now

    def _decoding(self, model: ModelHandle) -> Decoding:
        found = self._decodings.get(model)
        if found is None:
            if getattr(model.scheduler.engine.model, "stepper", None) is None:
                raise HTTPError(400, f"model {model.signature.name!r} does not generate tokens; use infer")
            loaded: Any = model.scheduler.engine.model
            try:
                found = self._decodings[model] = Decoding(loaded.generator, self._limits.max_waiting_prompts)
            except LeptonError as error:
                raise HTTPError(501, "the model's tokenizer cannot be used on this server") from error
        return found

    def _answer(
        self,
        model: ModelHandle,
        exchange: Exchange,
        write: Callable[[int, Generation, int | None, str], bytes] | None,
        whole: Callable[[list[Generation]], bytes],
        refuse: Refuse,
        request_id: str,
    ) -> _Answer:
        decoding, codes = self._decoding(model), self._metrics.codes

        def mirror(version: str, sequence: Generation) -> None:
            self._ask_shadow(model.name, version, sequence)

        return _Answer(exchange, decoding, model, codes, refuse, write, whole, self._workers, request_id, mirror)

    def _ask_shadow(self, name: str, version: str, sequence: Generation) -> None:
        """Has another version continue a prompt, one at a time, and compares; what is drawn differs anyway."""
        shadow = self._models.get(name, version)
        if shadow is None:
            return
        counted, busy = shadow.metrics.shadow, self._shadows
        if sequence.sampling.temperature or shadow in busy:
            counted["dropped"] += 1
            return

        def told(again: Generation, token: int | None, text: str) -> None:
            if token is None:
                busy.discard(shadow)
                ended = again.finish in ("stop", "length")
                counted["failed" if not ended else "same" if again.tokens == sequence.tokens else "different"] += 1

        try:
            decoding = self._decoding(shadow)
            again = decoding.engine.sequence(list(sequence.prompt), sequence.sampling)
            again.told = told
            decoding.submit(again)
            busy.add(shadow)
        except (HTTPError, InputError):
            counted["failed"] += 1

    def _find(self, name: str, exchange: Exchange) -> ModelHandle:
        """The model that a body names; where its versions share requests, one of them."""
        split = self._models.split(name)
        if split is None:
            return self._models.find(name, None, None)
        # Bodies in OpenAI's form have no id: by that, versions are drawn.
        sticky = split.sticky if split.sticky != BY_ID else ""
        choice = split.choose(exchange.head.headers.get(sticky.encode()) if sticky else None)
        shadow = split.shadow if split.has_shadow(choice.version) and split.mirrors() else None
        exchange.choice = choice.propensity, shadow
        return self._models.find(name, choice.version)

    def _read[T](self, exchange: Exchange, read: Callable[[], T], begin: Callable[[T], object], refuse: Refuse) -> None:
        """Reads a body, a long one on another thread, and goes on.

        Raises:
            HTTPError: what reading or going on raises, where the body is short.
        """
        if len(exchange.body) <= PIECE_BYTES:
            begin(read())
        else:
            self._workers.read(exchange, read, begin, refuse)

    def _check_size(self, model: ModelHandle, exchange: Exchange, prompts: int = 1) -> None:
        """Checks the size of a body by the longest prompt of the model."""
        steps = self._decoding(model).engine.steps
        most = _BODY_BYTES + prompts * _TOKEN_BYTES * steps.longest_prompt
        if len(exchange.body) > most:
            raise HTTPError(413, f"the body has {len(exchange.body)} bytes; {most} are enough for the longest prompt")

    # Triton's and KServe's form.

    def generate(self, model: ModelHandle, exchange: Exchange) -> None:
        """Answers with the whole text."""
        self._generate(model, exchange, stream=False)

    def stream(self, model: ModelHandle, exchange: Exchange) -> None:
        """Answers with an event for each token."""
        self._generate(model, exchange, stream=True)

    def events(self, model: ModelHandle, exchange: Exchange) -> None:
        """Answers an EventSource, which only does GET and asks again when a stream ends, until it gets 204."""
        if exchange.head.headers.get(b"last-event-id", b"") == generation.ENDED:
            self._metrics.codes[204] += 1
            exchange.answer(204, b"")
            return
        if exchange.head.method == b"HEAD":
            self._metrics.codes[200] += 1
            exchange.answer(200, b"", _EVENTS[0])
            return
        request, fields = generation.read_query(exchange.head.target)
        self._begin(model, exchange, request, generation.sampling_of(fields), stream=True, ended=generation.ENDED)

    def _generate(self, model: ModelHandle, exchange: Exchange, *, stream: bool) -> None:
        _check_coding(exchange)
        self._check_size(model, exchange)

        def begin(found: tuple[generation.GenerateRequest, dict[str, Any]]) -> None:
            request, fields = found
            beside = {name: value for name, value in fields.items() if name not in request.__struct_fields__}
            sampling = generation.sampling_of({**beside, **request.parameters})
            self._begin(model, exchange, request, sampling, stream=stream)

        body = exchange.body
        self._read(exchange, lambda: generation.read(body, generation.GenerateRequest), begin, self._refuse)

    def _begin(
        self,
        model: ModelHandle,
        exchange: Exchange,
        request: generation.GenerateRequest,
        sampling: Sampling,
        *,
        stream: bool,
        ended: bytes = b"",
    ) -> None:
        if (request.text_input is None) == (request.input_ids is None):
            raise HTTPError(400, "give either text_input or input_ids")
        if len(request.id) > MAX_ID:  # each event of a stream has it
            raise HTTPError(400, f"the id has {len(request.id)} characters; it may have {MAX_ID}")
        prompt: Any = request.text_input if request.text_input is not None else request.input_ids
        signature = model.signature

        def response(**told: Any) -> GenerateResponse:
            return GenerateResponse(model_name=signature.name, model_version=signature.version, id=request.id, **told)

        def details(sequence: Generation) -> dict[str, Any]:
            return {"finish_reason": sequence.finish, "generated_tokens": len(sequence.tokens)}

        def write(_: int, sequence: Generation, token: int | None, text: str) -> bytes:
            if token is None:
                return event(response(text_output=text, token_ids=[], details=details(sequence)), ended)
            return event(response(text_output=text, token_ids=[token]))

        def whole(sequences: list[Generation]) -> bytes:
            if stream:
                return b""
            (one,) = sequences
            text = one.text.text if one.text is not None else ""
            return msgspec.json.encode(response(text_output=text, token_ids=one.tokens, details=details(one)))

        told = write if stream else None
        self._answer(model, exchange, told, whole, self._refuse, request.id).start([prompt], sampling)

    # OpenAI's form.

    def list_models(self, exchange: Exchange) -> None:
        """Lists the models that generate."""
        names = {
            each.signature.name
            for each in self._models
            if getattr(each.scheduler.engine.model, "stepper", None) is not None
        }
        self._metrics.codes[200] += 1
        entries = [generation.ModelEntry(id=name) for name in sorted(names)]
        exchange.answer(200, msgspec.json.encode(generation.ModelList(data=entries)))

    def complete(self, exchange: Exchange) -> None:
        """Answers `/v1/completions`."""
        self._in_their_words(exchange, generation.CompletionRequest, self._begin_completion)

    def chat(self, exchange: Exchange) -> None:
        """Answers `/v1/chat/completions`."""
        self._in_their_words(exchange, generation.ChatRequest, self._begin_chat)

    def _in_their_words[T](
        self, exchange: Exchange, kind: type[T], begin: Callable[[Exchange, Asked[T]], object]
    ) -> None:
        """Reads a request whose client reads errors in OpenAI's form, and begins its answer."""
        body, refuse = exchange.body, self._refuse_in_their_words
        try:
            _check_coding(exchange)
            if len(body) > self._limits.max_body_bytes >> 3:
                raise HTTPError(413, "the body is too long for a prompt")
            self._read(
                exchange, lambda: generation.read_asked(body, kind), lambda asked: begin(exchange, asked), refuse
            )
        except HTTPError as refusal:
            refuse(exchange, refusal)

    def _refuse_in_their_words(self, exchange: Exchange, refusal: HTTPError) -> None:
        headers = refusal.headers or (("Retry-After: 1",) if refusal.status == 503 else ())
        kind = "invalid_request_error" if refusal.status < 500 else "server_error"
        body = msgspec.json.encode(generation.Refused(generation.Refusal(message=refusal.message, type=kind)))
        head = respond(refusal.status, len(body), "application/json", *headers)
        refusal.response = Response(refusal.status, head.fields + body, head.nbytes)
        self._refuse(exchange, refusal)

    def _begin_completion(self, exchange: Exchange, asked: Asked[generation.CompletionRequest]) -> None:
        model = self._find(asked.model, exchange)
        self._check_size(model, exchange, self._limits.max_waiting_prompts)
        request, fields = _request_of(asked)
        prompt: Any = request.prompt
        several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (str, list))
        prompts: list[Any] = prompt if several else [prompt]
        if len(prompts) > self._limits.max_waiting_prompts:
            raise HTTPError(400, f"{len(prompts)} prompts are more than {self._limits.max_waiting_prompts}")
        self._check_size(model, exchange, len(prompts))
        defaults = {"temperature": 1.0, "max_tokens": None}
        self._complete(model, exchange, request, prompts, generation.sampling_of(fields, defaults), chat=False)

    def _begin_chat(self, exchange: Exchange, asked: Asked[generation.ChatRequest]) -> None:
        model = self._find(asked.model, exchange)
        self._check_size(model, exchange)
        request, fields = _request_of(asked)
        if not request.messages:
            raise HTTPError(400, "messages is empty")
        sampling = generation.sampling_of(fields, {"temperature": 1.0})
        self._complete(model, exchange, request, [generation.chat_text(request.messages)], sampling, chat=True)

    def _complete(
        self,
        model: ModelHandle,
        exchange: Exchange,
        request: generation.CompletionRequest | generation.ChatRequest,
        prompts: list[Any],
        sampling: Sampling,
        *,
        chat: bool,
    ) -> None:
        number, created, stream = secrets.token_hex(12), int(time()), bool(request.stream)
        called = f"{'chatcmpl' if chat else 'cmpl'}-{number}"
        kind = ("chat.completion.chunk" if stream else "chat.completion") if chat else "text_completion"
        begun: set[int] = set()

        def completion(choices: list[dict[str, Any]], usage: generation.Usage | None = None) -> Completion:
            return Completion(
                id=called, object=kind, created=created, model=request.model, choices=choices, usage=usage
            )

        def choice(index: int, text: str, tokens: list[int], finish: str | None) -> dict[str, Any]:
            said: dict[str, Any] = {"index": index, "finish_reason": finish, "token_ids": tokens, "logprobs": None}
            if not chat:
                return said | {"text": text}
            message: dict[str, Any] = {"content": text}
            if not stream or index not in begun:
                message["role"] = "assistant"
                begun.add(index)
            return said | {"delta" if stream else "message": message}

        def usage(sequences: list[Generation]) -> generation.Usage:
            read, made = sum(len(each.prompt) for each in sequences), sum(len(each.tokens) for each in sequences)
            return generation.Usage(read, made, read + made)

        def write(index: int, sequence: Generation, token: int | None, text: str) -> bytes:
            if token is None:
                return event(completion([choice(index, text, [], sequence.finish)]))
            return event(completion([choice(index, text, [token], None)]))

        def whole(sequences: list[Generation]) -> bytes:
            if stream:
                options = request.stream_options
                wanted = options is not None and bool(options.include_usage)
                return (event(completion([], usage(sequences))) if wanted else b"") + event(b"[DONE]")
            choices = [
                choice(index, each.text.text if each.text is not None else "", each.tokens, each.finish)
                for index, each in enumerate(sequences)
            ]
            return msgspec.json.encode(completion(choices, usage(sequences)))

        refuse = self._refuse_in_their_words
        self._answer(model, exchange, write if stream else None, whole, refuse, called).start(prompts, sampling)


def _text_of(sequence: Generation) -> str:
    """The text of a reply, as feedback knows it."""
    return text_of_tokens(sequence.tokens) if sequence.text is None else sequence.text.text


def _check_coding(exchange: Exchange) -> None:
    """Refuses bodies that would have to be decompressed."""
    if exchange.head.headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise HTTPError(415, "send requests to generate without Content-Encoding")


def _request_of[T](asked: Asked[T]) -> tuple[T, dict[str, Any]]:
    if isinstance(asked.request, HTTPError):
        raise asked.request
    return asked.request
