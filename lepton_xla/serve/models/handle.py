"""A loaded model, and all that a request for it needs."""

from __future__ import annotations

from time import time

from lepton_xla.serve.batching.scheduler import Scheduler
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.monitor.monitor import Monitor
from lepton_xla.serve.monitor.replies import Replies
from lepton_xla.serve.monitor.sampler import Sampler
from lepton_xla.serve.observe.health import STALL_S, Health
from lepton_xla.serve.observe.metrics import Metrics
from lepton_xla.serve.protocol.signature import LoadedModel, Signature
from lepton_xla.serve.protocol.wire import Decoder


class ModelHandle:
    """One version of a model, loaded. Everything that is kept for it hangs on this object.

    A handle keeps its model in memory. Whoever keeps one for longer than a request keeps a weak reference, so that a
    model whose place another has taken goes with its last answer.

    Args:
        signature: the model's.
        scheduler: runs its calls, and tells them of their end on the event loop.
        metrics: counts its inferences.
        limits: the bounds on a request.
        stall_s: an execution that takes so long will not end.
        model: what runs.
        pinned: never evicted.

    Attributes:
        signature: name, version, inputs and outputs.
        scheduler: the queue and the engine.
        metrics: what is counted.
        health: whether it can answer.
        decoder: reads its requests. The specs that it keeps hold the heads of the answers.
        model, pinned: as given.
        sampler: keeps requests and answers in files, if the server keeps samples.
        replies: has what it generates watched and kept; None for a model that does not generate.
        monitor: watches its answers, if the server monitors. Another artifact in the place of the version has another.
    """

    __slots__ = (
        "__weakref__",
        "_opened_s",
        "decoder",
        "health",
        "metrics",
        "model",
        "monitor",
        "pinned",
        "replies",
        "sampler",
        "scheduler",
        "signature",
    )

    def __init__(
        self,
        signature: Signature,
        scheduler: Scheduler,
        metrics: Metrics,
        limits: Limits,
        stall_s: float = STALL_S,
        model: LoadedModel | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        self.pinned = pinned
        self.sampler: Sampler | None = None
        self.monitor: Monitor | None = None
        self.replies: Replies | None = None
        self._opened_s = time()
        self.model = model
        self.signature = signature
        self.scheduler = scheduler
        self.metrics = metrics
        self.health = Health(scheduler, metrics, stall_s)
        self.decoder = Decoder(signature, limits, scheduler.max_rows)

    @property
    def name(self) -> str:
        """The model's."""
        return self.signature.name

    @property
    def nbytes(self) -> int:
        """Bytes that it takes: weights, compiled code, and the arrays that batches are put together in.

        Weights are exact, and so are the arrays. Of compiled code XLA tells nothing: its serialized size is taken, and
        for each executable what loading a small one adds to the resident size of a process.
        """
        return self.scheduler.engine.nbytes

    @property
    def devices(self) -> tuple[int, ...]:
        """The numbers of the devices that it runs on together, that of its scheduler first."""
        first = self.scheduler.device.number
        return tuple(range(first, first + getattr(self.model, "device_count", 1)))

    @property
    def used_s(self) -> float:
        """When it last ran a batch, or was opened, in seconds since the epoch."""
        return max(self._opened_s, self.metrics.last_s)

    @property
    def requests(self) -> int:
        """How many it has answered, in handles before this one too."""
        return self.metrics.requests

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return self.scheduler.busy
