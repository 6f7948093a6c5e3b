"""How a server runs, as `leptonx serve` is told."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from urllib.parse import quote

from lepton_xla.errors import ServeError
from lepton_xla.serve.access.access import Access
from lepton_xla.serve.access.tls import TlsFiles
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.monitor.rules import Rules
from lepton_xla.serve.observe.tracing import check_endpoint
from lepton_xla.serve.protocol.metadata import SERVER_NAME
from lepton_xla.serve.protocol.routes import TOKENLESS_PATHS


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How a server runs.

    Attributes:
        host: address to listen on; only this machine can reach the default.
        port: 0 picks a free one.
        unix_socket: file of a Unix socket to listen on, instead of host and port.
        name: model name on the wire, if not the model's own.
        server_name: what the server's metadata calls it; some clients look for "triton".
        max_delay_us: batching delay: how long a request may wait, in microseconds, for others to share its batch while
            the engine is idle.
        max_queue_rows: rows that may wait; more get 503. Also the most rows of one request.
        max_queue_bytes: memory of the requests that may wait; more get 503.
        default_timeout_s: for requests that give no timeout; None waits for ever.
        max_timeout_s: the longest wait for any request; longer timeouts are cut to it. None sets no bound.
        priority_levels: the parameter `priority` may be 1, which is the highest, to this. Requests that do not say are
            on the middle level, the lower of two.
        compress_bytes: the smallest answer worth compressing for a client that accepts it.
        lame_duck_s: how long after a stop is asked for new connections are still taken and idle ones kept, readiness
            already being 503.
        stop_timeout_s: how long after that a stop waits for answers.
        access_log_sample: of the requests, 0 to 1, that the log gets a line of.
        alerts: file of alert rules, see `leptonx alerts`; None has none.
        certificate_rollback: move a label from a version whose certificate does not hold, by feedback, back to the
            version that it stood on before; only of a repository. Otherwise an alert says so.
        monitor: whether to compare what is asked and answered with the profile that the artifact has, and to keep
            answers for feedback.
        samples: folder to keep sampled requests in, with their answers and the feedback that comes for them; None keeps
            none. See `lepton_xla.samples`.
        samples_rate: share of the requests with an id that is kept, where a model's settings do not say.
        otel_endpoint: URL of a collector of OpenTelemetry traces, over HTTP; None has the standard variables say.
        limits: what clients may send.
        token_file: the tokens to ask for, see `leptonx token`; None asks for none.
        tls: certificates to listen with; None speaks plain HTTP.
        trust: a public key, or a folder of them, one of which must have signed each artifact; None loads any.
        decrypt_key: file of the private key that decrypts artifacts; None takes that of the environment.
        explicit: load the models of a repository only when a client asks for them; otherwise all are, and changes of
            the repository are seen.
        load: names of models to load at the start nevertheless.
        memory: bytes that the models of a repository may take together: each is loaded when it is asked for, and the
            one that was asked for least of late is evicted for it. None loads all.
        load_wait_s: with `memory`, how long a request waits for its model.
        repository_poll_s: how often to look for changes of the repository.
        audit_log: file that says who loaded and unloaded which version, and what could not be; None for none.
        insecure_public: listen on an address that other machines can reach though neither a token file nor the
            certificates of clients say who may ask.

    Raises:
        ServeError: for a value out of range.

    >>> from lepton_xla.serve import Limits, Options
    >>> options = Options(port=0, max_delay_us=500, limits=Limits(max_body_bytes=1 << 20))
    >>> options.host, options.limits.max_body_bytes
    ('127.0.0.1', 1048576)
    >>> Options(host="0.0.0.0").access()
    Traceback (most recent call last):
    lepton_xla.errors.ServeError: 0.0.0.0 can be reached by other machines and nothing says who may ask: ...
    """

    host: str = "127.0.0.1"
    port: int = 8000
    unix_socket: Path | None = None
    name: str | None = None
    server_name: str = SERVER_NAME
    max_delay_us: int = 0
    max_queue_rows: int = 4096
    max_queue_bytes: int = 256 << 20
    default_timeout_s: float | None = None
    max_timeout_s: float | None = None
    priority_levels: int = 3
    compress_bytes: int = 4096
    lame_duck_s: float = 0.0
    stop_timeout_s: float = 30.0
    access_log_sample: float = 0.0
    alerts: Path | None = None
    certificate_rollback: bool = False
    monitor: bool = True
    samples: Path | None = None
    samples_rate: float = 1.0
    otel_endpoint: str | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)
    token_file: Path | None = None
    tls: TlsFiles | None = None
    trust: Path | None = None
    decrypt_key: Path | None = None
    insecure_public: bool = False
    explicit: bool = False
    load: tuple[str, ...] = ()
    memory: int | None = None
    load_wait_s: float = 10.0
    repository_poll_s: float = 1.0
    audit_log: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ServeError(f"port must be 0 to 65535, not {self.port}")
        for name, least in (
            ("max_delay_us", 0), ("max_queue_rows", 1), ("max_queue_bytes", 1), ("priority_levels", 1),
            ("lame_duck_s", 0), ("stop_timeout_s", 0),
        ):  # fmt: skip
            if not least <= getattr(self, name) < math.inf:
                raise ServeError(f"{name} must be at least {least} and finite, not {getattr(self, name)!r}")
        if self.otel_endpoint is not None:
            check_endpoint(self.otel_endpoint)
        if not 0 <= self.access_log_sample <= 1:
            raise ServeError(f"access_log_sample must be 0 to 1, not {self.access_log_sample!r}")
        if not 0 <= self.samples_rate <= 1:
            raise ServeError(f"samples_rate must be 0 to 1, not {self.samples_rate!r}")
        if self.samples is not None and not self.monitor:
            raise ServeError("samples are kept to learn from feedback, which a server without `monitor` does not take")
        if not 0 < self.repository_poll_s < math.inf:
            raise ServeError(f"repository_poll_s must be positive and finite, not {self.repository_poll_s!r}")
        if not 0 < self.load_wait_s < math.inf:
            raise ServeError(f"load_wait_s must be positive and finite, not {self.load_wait_s!r}")
        if self.memory is not None and self.memory < 1:
            raise ServeError(f"memory must be at least 1 byte, not {self.memory!r}")
        if self.load and not self.explicit and self.memory is None:
            raise ServeError("models to load are named, but without `explicit` all models of a repository are loaded")
        for name in ("default_timeout_s", "max_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ServeError(f"{name} must be positive, or None for no bound, not {value!r}")

    def rules(self) -> Rules | None:
        """Read the alert rules, if there are some.

        >>> Options().rules() is None
        True

        Raises:
            ServeError: see `Rules.load`.
        """
        return None if self.alerts is None else Rules.load(self.alerts)

    def access(self) -> Access:
        """Read the files that say who may ask.

        Raises:
            ServeError: see `Access`.
        """
        return Access(
            self.host, self.port,
            token_file=self.token_file, tls=self.tls, open_paths=TOKENLESS_PATHS, public=self.insecure_public,
            unix_socket=self.unix_socket,
        )  # fmt: skip


def url_of(address: tuple[str, int], options: Options) -> str:
    """The URL of a server that listens there.

    >>> url_of(("127.0.0.1", 8000), Options()), url_of(("::1", 8000), Options())
    ('http://127.0.0.1:8000', 'http://[::1]:8000')
    """
    host, port = address
    if options.unix_socket is not None:
        return f"{'http' if options.tls is None else 'https'}+unix://{quote(host, safe='')}"
    scheme = "http" if options.tls is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
