"""Loads versions of a repository: reads and checks an artifact, and runs it once, beside what serves."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lepton_xla.errors import ServeError
from lepton_xla.files.copies import listing_of
from lepton_xla.pieces import rest, resting
from lepton_xla.serve.app.options import Options
from lepton_xla.serve.batching.costs import Measured
from lepton_xla.serve.batching.device import Device
from lepton_xla.serve.batching.engine import Engine, Timing
from lepton_xla.serve.batching.scheduler import Call, Scheduler
from lepton_xla.serve.models.changes import Source
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.models.settings import Serving
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.protocol.signature import LoadedModel, Signature, signature_of
from lepton_xla.serve.signatures import SigningTimes

if TYPE_CHECKING:
    from lepton_xla.compiler.servable import Servable
    from lepton_xla.trust.keys import TrustedKeys

# Part of the device's time that a model which warms up gets beside one that serves.
_WARMING_WEIGHT = 0.25
# Programs whose times are kept.
_MOST_TIMINGS = 256
# After each piece of work, while requests come. Beside pieces of 0.2 ms those that serve have nine tenths of a core and
# more. With a third of it p99 in the second of a swap was a tenth higher; of large models, which would be loaded for
# minutes, all rests but the first thousand are that short.
_REST_S, _SHORT_REST_S, _LONG_RESTS = 3e-3, 1e-3, 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Warm:
    """A model that is loaded and has run, and has no queue yet.

    Attributes:
        model: the model.
        signature: what it is called, and its inputs and outputs.
        engine: runs it.
        measured: what its executions took.
        options: how it is served.
        serving: how it is served beside others.
        device: what it runs on; None for the first.
    """

    model: LoadedModel
    signature: Signature
    engine: Engine[Call]
    measured: Measured
    options: Options
    serving: Serving = dataclasses.field(default_factory=Serving)
    device: Device | None = None


class ArtifactLoader:
    """Makes handles of artifacts; a `Loader` of `Host`.

    Args:
        options: of the server.
        metrics: of the server.
        make: makes the handle of a version, on the event loop.
        devices: what models run on, by number.
    """

    def __init__(
        self, options: Options, metrics: ServerMetrics, make: Callable[[Warm], ModelHandle], devices: Sequence[Device]
    ) -> None:
        self._devices = devices
        self._options = options
        self._metrics = metrics
        self._make = make
        self._timings: dict[tuple[str, str], Timing] = {}
        self._turns = self._turns_before = self._rests = 0
        self._times = None if options.trust is None else SigningTimes(options.trust)

    def load(self, name: str, version: str, source: Source, others: Sequence[ModelHandle]) -> Warm:
        """Reads, checks and warms up a version.

        Raises:
            LeptonError: for an artifact that is damaged or not trusted, does not fit this machine, or holds NaN.
        """
        served = self._given() != self._turns_before
        self._rests = 0
        try:
            with resting(self._rest) if served else contextlib.nullcontext():
                return self._load(name, version, source, others)
        finally:
            self._turns_before = self._given()

    def _given(self) -> int:
        return sum(device.turns for device in self._devices)

    def _rest(self) -> None:
        """Lets those have the core that answer requests, if any came since the last piece of work."""
        turns, before = self._given(), self._turns
        self._turns = turns
        if turns != before or any(device.running for device in self._devices):
            self._rests += 1
            time.sleep(_REST_S if self._rests <= _LONG_RESTS else _SHORT_REST_S)

    def _load(self, name: str, version: str, source: Source, others: Sequence[ModelHandle]) -> Warm:
        from lepton_xla.compiler import load

        trust = None if self._times is None else self._times.keys_for(name, version, source.path)
        decrypt_key = self._options.decrypt_key
        buckets = None if source.max_batch_size is None else _buckets(source.path, source.max_batch_size, trust)
        device = self._place(source, others)
        base = self._base(name, version, source, others if buckets is None else (), device)
        rest()
        servable = load(
            source.path, buckets=buckets, trust=trust, decrypt_key=decrypt_key, base=base, check=True,
            device=device.number,
        )  # fmt: skip
        rest()
        if self._times is not None and trust is not None:
            self._times.loaded(name, version, source.path, trust)
        if servable.device_count > 1:
            device = self._devices[0]
        signature = signature_of(servable, name, version)
        engine: Engine[Call] = Engine(servable, signature, staging=device.staging)
        options = _served(self._options, source.serving, source.max_delay_us)
        with device.guest(_WARMING_WEIGHT) as run:
            sharing = None if base is None else next((each for each in others if each.model is base), None)
            timed = self._timings.get((servable.manifest.fit, str(signature.buckets)))
            if sharing is not None and servable.route == "shared":
                measured = engine.warm_up(run, sharing.scheduler.engine, same_code=True)
            elif timed is not None:
                measured = engine.warm_up(run, timed, same_program=True)
            else:
                measured = engine.warm_up(run, _like(signature, others))
                self._note(servable.manifest.fit, engine, signature)
        return Warm(servable, signature, engine, measured, options, source.serving, device)

    def _note(self, fit: str, engine: Engine[Call], signature: Signature) -> None:
        """Keeps what was measured: a model that is evicted and comes again takes as long, and others wait meanwhile."""
        if fit:
            self._timings[fit, str(signature.buckets)] = Timing(engine.measured, engine.busy_processors)
            while len(self._timings) > _MOST_TIMINGS:
                del self._timings[next(iter(self._timings))]

    def _place(self, source: Source, others: Sequence[ModelHandle]) -> Device:
        """The device that is asked for, or that of the other versions, or the one that has the fewest models."""
        if source.device is not None:
            return self._devices[source.device]
        if others:
            return others[-1].scheduler.device
        return min(self._devices, key=lambda device: device.count)

    def _base(
        self, name: str, version: str, source: Source, others: Sequence[ModelHandle], device: Device
    ) -> Servable | None:
        """A model whose compiled code a version can run on: one that is loaded, or for weights alone one on the disk.

        Raises:
            LeptonError: for weights alone that fit no version.
        """
        from lepton_xla.compiler import Servable, load

        path = Path(source.path)
        listing, _ = listing_of(path)
        for other in others:
            model, here = other.model, other.scheduler.device is device
            if not isinstance(model, Servable) or not (here or model.device_count > 1) or not _is_whole(model):
                continue
            if listing.fit and model.manifest.fit == listing.fit:
                return model
        if not listing.is_update:
            return None
        found = Repository(path.parents[1]).find_base(name, version)
        if found is None:
            return None
        return load(
            found, trust=self._options.trust, decrypt_key=self._options.decrypt_key, device=device.number
        )  # fmt: skip

    def open(self, loaded: Warm) -> ModelHandle:
        """Makes the handle of a loaded version, on the event loop."""
        return self._make(loaded)

    def close(self, name: str, version: str, scheduler: Scheduler) -> None:
        """Ends what served a version that is gone."""
        self._metrics.closed(name, version)
        scheduler.stop()


def devices_of_process() -> list[Device]:
    """One for each device that JAX finds here.

    Raises:
        ExecutionError: if it finds none.
    """
    from lepton_xla.compiler.devices import count_here

    return [Device(number=number) for number in range(count_here())]


def _like(signature: Signature, others: Sequence[ModelHandle]) -> Engine[Call] | None:
    """The engine of a version with the same inputs, outputs and compiled sizes, the latest first."""

    def shape(each: Signature) -> tuple[object, ...]:
        return each.inputs, each.outputs, each.bucket_sizes, each.buckets

    same = (each.scheduler.engine for each in reversed(others) if shape(each.signature) == shape(signature))
    return next(same, None)


def _buckets(path: str, most: int, trust: TrustedKeys | None) -> dict[str, tuple[int, ...]]:
    """The compiled sizes to load, where only batches up to a size are wanted."""
    from lepton_xla.compiler.opening import read_trusted_manifest
    from lepton_xla.compiler.storage import Store
    from lepton_xla.rows import row_symbol

    manifest = read_trusted_manifest(Store(path), trust)
    rows = row_symbol(manifest.input_specs())
    sizes = () if rows is None else manifest.buckets[rows]
    if rows is None or most not in sizes:
        raise ServeError(f"max_batch_size {most} is none of the compiled sizes: {', '.join(map(str, sizes)) or 'none'}")
    return {rows: tuple(size for size in sizes if size <= most)}


def _is_whole(model: Servable) -> bool:
    """Whether all compiled sizes are loaded."""
    return model.buckets == {name: tuple(sizes) for name, sizes in model.manifest.buckets.items()}


def _served(options: Options, serving: Serving, max_delay_us: int | None) -> Options:
    """The options of a server as one model has them."""
    fields = {
        "max_queue_rows": serving.max_queue_rows,
        "max_queue_bytes": serving.max_queue_bytes,
        "max_delay_us": max_delay_us if max_delay_us is not None else serving.max_delay_us,
        "default_timeout_s": serving.default_timeout_s,
    }
    return dataclasses.replace(options, **{name: value for name, value in fields.items() if value is not None})
