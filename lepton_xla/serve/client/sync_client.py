"""A client whose calls wait for their answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from lepton_xla.errors import ServeError
from lepton_xla.serve.client import documents
from lepton_xla.serve.client.calls import (
    Attempts,
    Caller,
    RequestOf,
    Search,
    arrays_of,
    feedback_of,
    is_good,
    json_of,
    only,
    route,
    text_of,
)
from lepton_xla.serve.client.replicas import Replica, StalledError, UnreachedError
from lepton_xla.serve.client.transport import PATIENCE_S, Answer, BlockingChannel, RequestError, left
from lepton_xla.serve.protocol.monitoring import FeedbackTaken

if TYPE_CHECKING:
    from jaxtyping import Shaped


class Client(Caller):
    """A client that waits for its answers. Threads may share one; it keeps a connection for each that asks at once.

    A request that gets no answer, or 503 or 429, is sent again: after exponentially growing random delays, and not
    before the server's `Retry-After`. Inference changes nothing on the server, so asking twice does no harm.

    Given several URLs, it asks the server with the fewest requests of this client. What one does not answer, another is
    asked. Servers that fail, or take three times as long as the others, are left out: for a second, then for two, up to
    a minute; then one request tells whether they are well.

    Args:
        url: such as `http://127.0.0.1:8000`, `https://models.example/prefix`, `localhost:8000`, or
            `http+unix://%2Frun%2Fdigits.sock` for a Unix socket; or several, of servers of the same models.
        model: which model methods ask for that are not told; by default the server's only one.
        token: bearer token; by default that of the variable `LEPTON_TOKEN`, if it is set.
        token_file: file that holds the token.
        tls_ca: certificates (PEM) to trust instead of the system's.
        tls_cert: the client's own certificate (PEM), for a server that asks for one.
        tls_key: its private key, if not in the same file.
        timeout_s: seconds for a call, all attempts and delays included; the server is told too.
        retries: attempts after the first.
        max_connections: requests on their way at once; more wait for their turn.
        binary: whether tensors travel as bytes; unset for servers without the binary tensor extension.

    Raises:
        ServeError: for a URL, token or certificate that cannot be used.

    >>> from lepton_xla.serve import Client
    >>> with Client(url, model="double") as client:  # url: of a server with the model y = 2 x
    ...     client.infer(x=np.float32([[1, 2]]))["y"]
    array([[2., 4.]], dtype=float32)
    >>> with Client([url, "http://127.0.0.1:1"]) as client:  # nobody listens at the second
    ...     client.ready("double")
    True
    """

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(self._max_connections)

    def infer(
        self,
        model: str | None = None,
        inputs: Mapping[str, Any] | None = None,
        /,
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        **more: Any,
    ) -> dict[str, Shaped[np.ndarray, "*_"]]:
        """Run a model.

        Args:
            model: its name.
            inputs: arrays by name, for names that are no Python names; the others may be given as keywords.
            outputs: which outputs to return; by default all.
            timeout_s: seconds for this call, instead of the client's.
            priority: 1 is served first, then 2 and so on; by default the server's own choice.
            request_id: what to call the request, for `feedback` and the server's log.
            **more: inputs by name; anything `numpy.asarray` takes. Python's numbers travel as FP32 and INT32, as in
                JAX; bfloat16 is ml_dtypes'.

        Returns:
            The outputs by name, as arrays of their own. BYTES come as `bytes` objects.

        Raises:
            RequestError: with the server's message and HTTP status, or status None if it could not be reached;
                DeadlineError if the time ran out.
            InputError: for an array that the protocol cannot carry.

        >>> with Client(url) as client:
        ...     client.infer("double", {"x": np.ones((1, 2), np.float32)}, outputs=["y"], timeout_s=10)
        {'y': array([[2., 2.]], dtype=float32)}
        """
        attempts = self._attempts(timeout_s)
        name = self._name(model, attempts)
        request = self._infer(attempts, name, {**(inputs or {}), **more}, outputs, priority, request_id)
        return arrays_of(self._call(request, attempts))

    def feedback(
        self, model: str | None, labels: Mapping[str, int | Sequence[int] | str], *, timeout_s: float | None = None
    ) -> int:
        """Tell the server the right answers of earlier requests, all or none.

        Of several servers each is asked, until one has answered the request; then requests are judged one by one.

        Args:
            model: its name; None for the server's only one.
            labels: the `request_id` of each -> its class, or the class of each of its rows; of a model that generates,
                the right reply.
            timeout_s: seconds for this call, instead of the client's.

        Returns:
            How many rows were judged.

        Raises:
            RequestError: 404 for a request that the model has not answered, or not lately; 409 for one that has had
                other feedback.
            InputError: if a label is neither an integer nor a text.

        >>> with Client(url) as client:
        ...     _ = client.infer("double", x=np.float32([[1, 2]]), request_id="first")
        ...     client.feedback("double", {"first": 1})
        1
        """
        attempts = self._attempts(timeout_s)
        path = f"{route(self._name(model, attempts))}/feedback"
        if not self._replicas.several:
            answer = self._call(self._plain(path, "POST", feedback_of(labels)), attempts)
            return json_of(answer, FeedbackTaken)["rows"]
        bodies = [feedback_of({name: label}) for name, label in labels.items()]
        return sum(self._judge(self._plain(path, "POST", body), timeout_s) for body in bodies)

    def monitor(self, model: str | None = None) -> dict[str, Any]:
        """Ask how far a model's data have drifted, and how often its answers were right.

        >>> with Client(url) as client:
        ...     client.monitor("double")["drift"]  # its artifact has no profile
        []
        """
        return self._get(model, "/monitor")

    def traffic(self, model: str | None = None) -> dict[str, Any]:
        """Ask how requests that name no version are shared among a model's versions, and how each does.

        >>> with Client(url) as client:
        ...     client.traffic("double")
        Traceback (most recent call last):
        lepton_xla.serve.client.transport.RequestError: ...this server has no repository of models...
        """
        return self._get(model, "/traffic", documents.TrafficTold)

    def rollout(self, model: str | None = None) -> dict[str, Any]:
        """Ask for the last rollout of a model: its `state`, the `reason`, and all `decisions`.

        >>> with Client(url) as client:
        ...     client.rollout("double")
        Traceback (most recent call last):
        lepton_xla.serve.client.transport.RequestError: ...this server has no repository of models...
        """
        return self._get(model, "/rollout", documents.RolloutTold)

    def adjustment(self, model: str | None = None) -> dict[str, Any]:
        """Ask for the last adjustment of a model: its `state`, the `step` that serves, `reason` and all `decisions`.

        >>> with Client(url) as client:
        ...     client.adjustment("double")
        Traceback (most recent call last):
        lepton_xla.serve.client.transport.RequestError: ...this server has no repository of models...
        """
        return self._get(model, "/adjustment", documents.AdjustmentTold)

    def metadata(self, model: str | None = None) -> dict[str, Any]:
        """Ask for the names, datatypes and shapes of a model's inputs and outputs; -1 is a dimension that varies.

        >>> with Client(url) as client:
        ...     client.metadata("double")["inputs"]
        [{'name': 'x', 'datatype': 'FP32', 'shape': [-1, 2]}]
        """
        return self._get(model, "", documents.MetadataTold)

    def config(self, model: str | None = None) -> dict[str, Any]:
        """Ask for a model's configuration, as Triton writes it.

        >>> with Client(url) as client:
        ...     client.config("double")["max_batch_size"]
        4
        """
        return self._get(model, "/config")

    def stats(self, model: str | None = None) -> dict[str, Any]:
        """Ask for a model's statistics, as Triton writes them: counts and nanoseconds that only grow.

        >>> with Client(url) as client:
        ...     client.stats("double")["model_stats"][0]["name"]
        'double'
        """
        return self._get(model, "/stats")

    def server(self) -> dict[str, Any]:
        """Ask for the server's name, version and extensions.

        >>> with Client(url) as client:
        ...     client.server()["name"]
        'lepton_xla'
        """
        return json_of(self._call(self._plain("/v2"), self._attempts()), documents.Named)

    def metrics(self) -> str:
        """Ask for all figures of the server, in Prometheus' text format.

        >>> with Client(url) as client:
        ...     "lepton_model_ready{" in client.metrics()
        True
        """
        return text_of(self._call(self._plain("/metrics"), self._attempts()))

    def index(self) -> list[dict[str, Any]]:
        """Ask for the models that the server has, and their state.

        >>> with Client(url) as client:
        ...     client.index()
        [{'name': 'double', 'version': '1', 'state': 'READY'}]
        """
        return json_of(
            self._call(self._plain("/v2/repository/index", "POST"), self._attempts()), list[documents.IndexedTold]
        )

    def ready(self, model: str | None = None) -> bool:
        """Ask whether the server, or one model, takes requests now. One attempt; no answer is no.

        Raises:
            RequestError: if the token does not allow to ask.

        >>> with Client(url) as client:
        ...     client.ready("double"), Client("http://127.0.0.1:1").ready()  # nobody listens there
        (True, False)
        """
        return self._probe("/v2/health/ready" if model is None else f"{route(model)}/ready")

    def live(self) -> bool:
        """Ask whether the server answers at all. One attempt; no answer is no.

        >>> with Client(url) as client:
        ...     client.live()
        True
        """
        return self._probe("/v2/health/live")

    def close(self) -> None:
        """Close every idle connection; those in use are closed after their answer.

        >>> client = Client(url)
        >>> client.close()
        >>> client.live()
        Traceback (most recent call last):
        lepton_xla.errors.ServeError: the client is closed
        """
        with self._lock:
            self._closed = True
            idle = [connection for replica in self._replicas.all for connection in replica.idle]
            for replica in self._replicas.all:
                replica.idle.clear()
        for connection in idle:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _name(self, model: str | None, attempts: Attempts) -> str:
        if model is not None:
            return model
        if self._model is None:
            found = json_of(
                self._call(self._plain("/v2/repository/index", "POST"), attempts), list[documents.IndexedTold]
            )
            self._model = only(found)
        return self._model

    def _judge(self, request: RequestOf, timeout_s: float | None) -> int:
        """Give the feedback of one request to the server that knows it."""
        search = Search(self._replicas)
        for replica in search.left():
            attempts = self._attempts(timeout_s)
            attempts.only = replica
            try:
                search.heard(self._call(request, attempts))
            except RequestError as error:
                search.missed(error)
        return json_of(search.answer(), FeedbackTaken)["rows"]

    def _get(self, model: str | None, action: str, kind: Any = dict[str, Any]) -> dict[str, Any]:
        attempts = self._attempts()
        path = route(self._name(model, attempts)) + action
        return json_of(self._call(self._plain(path), attempts), kind)

    def _probe(self, path: str) -> bool:
        try:
            return is_good(self._call(self._plain(path), self._attempts(retries=0)))
        except RequestError as error:
            if error.status is not None:
                raise
            return False

    def _call(self, request: RequestOf, attempts: Attempts) -> Answer:
        while True:
            outcome: Answer | OSError
            try:
                if not self._turns.acquire(timeout=left(attempts.deadline)):
                    raise TimeoutError
                replica = attempts.begin()
                try:
                    outcome = self._exchange(replica, request(replica.endpoint, attempts.left()), attempts.deadline)
                finally:
                    attempts.end()
                    self._turns.release()
            except OSError as error:
                outcome = error.with_traceback(None)  # which would lead back to this frame
            delay = attempts.delay(outcome)
            if delay is None:
                assert isinstance(outcome, Answer)
                return outcome
            time.sleep(delay)

    def _exchange(self, replica: Replica, request: bytes, deadline: float) -> Answer:
        connection = self._take(replica) or self._connect(replica, deadline)
        try:
            doubt = (lambda: self._doubt(replica, deadline)) if self._replicas.several else None
            answer = connection.exchange(request, deadline, doubt)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            keep = connection.open and not self._closed
            if keep:
                replica.idle.append(connection)
        if not keep:
            connection.close()
        return answer

    def _take(self, replica: Replica) -> BlockingChannel | None:
        """The connection used last, so that those not needed any more grow old and are closed by the server."""
        while True:
            with self._lock:
                if self._closed:
                    raise ServeError("the client is closed")
                if not replica.idle:
                    return None
                connection = replica.idle.pop()
            if connection.idle():
                return connection
            connection.close()

    def _connect(self, replica: Replica, deadline: float) -> BlockingChannel:
        if not self._replicas.several:
            return BlockingChannel(replica.endpoint, deadline)
        try:
            return BlockingChannel(replica.endpoint, min(deadline, time.monotonic() + PATIENCE_S))
        except TimeoutError:
            left(deadline)
            raise UnreachedError(f"no connection within {PATIENCE_S:g} s") from None

    def _doubt(self, replica: Replica, deadline: float) -> None:
        """Ask a replica that has not answered for long whether it is alive.

        Raises:
            StalledError: if it does not say so; TimeoutError at the deadline.
        """
        if self._replicas.silence_s(replica) < PATIENCE_S:
            return
        until = min(deadline, time.monotonic() + PATIENCE_S)
        try:
            probe = BlockingChannel(replica.endpoint, until)
            try:
                probe.exchange(replica.endpoint.request("GET", "/v2/health/live"), until)
            finally:
                probe.close()
        except OSError as error:
            left(deadline)
            raise StalledError("the server stopped answering") from error
        self._replicas.heard(replica)
