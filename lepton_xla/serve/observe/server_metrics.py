"""What a whole server counts: HTTP answers and connections, and the counters of every version of every model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from time import monotonic
from typing import Any

from prometheus_client import ProcessCollector

from lepton_xla.serve.monitor.feedback import Feedback
from lepton_xla.serve.monitor.monitoring import Monitoring
from lepton_xla.serve.observe.metrics import Metrics, added

PROCESS = ProcessCollector(registry=None)
"""Metrics of this process from the Prometheus client."""

MOST_KEPT = 16
"""Versions of one model that are not loaded any more and whose counters are kept."""

# Answers of versions that are loaded no more are kept for late feedback: so long, and of all of them together so many,
# of so many bytes.
LATE_S = 600.0
_LATE_ANSWERS, _LATE_BYTES = 100_000, 64 << 20

# A server in several processes shows the sum of these.
_PROCESS_SUMS = frozenset(
    f"process_{name}" for name in ("cpu_seconds_total", "resident_memory_bytes", "virtual_memory_bytes", "open_fds")
)
_SERVER = ""


class ServerMetrics:
    """The counters of a server.

    Args:
        clock: seconds, monotonic.

    Attributes:
        codes: HTTP answers by status, without the results of inferences, which each `Metrics` counts.
        now: figures that go up and down, as last looked at.
        look: called before figures are shown, to bring `now` of this and of each model up to date.
        ready: whether the server takes requests.
        live: whether it is worth keeping; false where only a new process would help.
        monitoring: drift and alerts, of all processes together.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self.codes: Counter[int] = Counter()
        self.ready = False
        self.live = True
        self.now: dict[str, Any] = dict.fromkeys(("in_flight", "connections", "buffered_bytes"), 0.0)
        self.look: Callable[[], object] | None = self._look_at_process
        self.monitoring = Monitoring()
        self._models: dict[tuple[str, str], Metrics] = {}
        self._loaded: Counter[tuple[str, str]] = Counter()
        # When versions whose answers are kept were closed, the latest last.
        self._late: dict[tuple[str, str], float] = {}

    def __iter__(self) -> Iterator[Metrics]:
        """The counters of every version, by name and in the order in which versions were first loaded."""
        return iter(sorted(self._models.values(), key=lambda each: each.model))

    def of(self, model: str, version: str) -> Metrics:
        """The counters of a version, new ones if it has none yet."""
        found = self._models.get((model, version))
        if found is None:
            found = self._models[model, version] = Metrics(model, version)
        return found

    def opened(self, model: str, version: str) -> Metrics:
        """The counters of a version that is loaded now. Those that it had before go on."""
        self._loaded[model, version] += 1
        self._late.pop((model, version), None)
        return self.of(model, version)

    def closed(self, model: str, version: str) -> None:
        """Told of a version that is loaded no more. The counters of the latest `MOST_KEPT` of a model are kept, and for
        a while answers.
        """
        self._loaded[model, version] -= 1
        if not self._loaded[model, version]:
            del self._loaded[model, version]
            self._late[model, version] = self._clock()
        gone = [key for key in self._models if key[0] == model and key not in self._loaded]
        gone.sort(key=lambda key: self._models[key].last_s)
        for key in gone[:-MOST_KEPT]:
            self.codes[200] += self._models.pop(key).requests
            self._late.pop(key, None)
        self._forget()

    def judges(self, model: str) -> list[Feedback]:
        """What judges the answers of a model: of each version that is loaded, and then of those that lately were."""
        self._forget()
        late = [key for key in reversed(self._late) if key[0] == model]
        return [
            monitor.feedback
            for key in (*(key for key in self._models if key[0] == model and key in self._loaded), *late)
            if (monitor := self.of(*key).monitor) is not None and monitor.feedback is not None
        ]

    def _forget(self) -> None:
        """Drops the answers of versions that were closed too long ago, or beyond the bounds, the oldest first."""
        now_s, answers, size = self._clock(), 0, 0
        for key, closed_s in reversed(tuple(self._late.items())):
            monitor = self.of(*key).monitor
            if monitor is None or monitor.feedback is None:
                del self._late[key]
                continue
            answers += monitor.feedback.count
            size += monitor.feedback.nbytes
            if now_s - closed_s > LATE_S or answers > _LATE_ANSWERS or size > _LATE_BYTES:
                monitor.feedback.forget()
                del self._late[key]

    def all_codes(self) -> Counter[int]:
        """HTTP answers by status, the results of inferences included."""
        answered = sum(each.requests for each in self._models.values())
        return self.codes + Counter({200: answered})

    def _look_at_process(self) -> None:
        for family in PROCESS.collect():
            self.now |= {each.name: each.value for each in family.samples if each.name in _PROCESS_SUMS}

    def watch(self, read: Callable[[], Mapping[str, Any]]) -> None:
        """Sets a function that gives the server's gauges, and sets those of the models, just before they are shown."""

        def look() -> None:
            self._look_at_process()
            self.now |= read()

        self.look = look

    def bring_up_to_date(self) -> None:
        """Counts values not counted yet, and reads the gauges."""
        self._forget()
        for each in self._models.values():
            each.count_noted()
        if self.look is not None:
            self.look()

    def counts(self) -> dict[str, Any]:
        """What was counted so far, as plain data that another process may add to its own with `plus`.

        Returns:
            An entry for the server, and one for each version, by `model/version`: independent of one another.
        """
        self.bring_up_to_date()
        server = {"codes": {str(code): count for code, count in self.codes.items()}, "now": dict(self.now)}
        models = {f"{model}/{version}": each.counts() for (model, version), each in self._models.items()}
        return {_SERVER: server, **models}

    def plus(self, counts: Mapping[str, Any]) -> ServerMetrics:
        """What was counted here and elsewhere, of a server in several processes.

        Args:
            counts: from `counts`, or the sum of several by `added`.
        """
        total = ServerMetrics()
        total.ready, total.live, total.look = self.ready, self.live, None
        total.monitoring = self.monitoring
        for key, value in added(self.counts(), counts).items():
            if key == _SERVER:
                total.codes = Counter({int(code): count for code, count in value.get("codes", {}).items()})
                total.now = value["now"]
            else:
                model, _, version = key.partition("/")
                total._models[model, version] = Metrics.of_counts(model, version, value)
        return total


def lasting(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a process has counted, that which still counts when it is gone: all but the gauges."""
    return {key: {name: value for name, value in each.items() if name != "now"} for key, each in counts.items()}
