"""What has to change so that the loaded versions of a model are those that are wanted: decided without loading."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from lepton_xla.serve.models.repository import Found
from lepton_xla.serve.models.settings import Serving
from lepton_xla.serve.protocol.traffic import Traffic


class Source(msgspec.Struct, frozen=True):
    """Where a version comes from. Two that are equal give the same version.

    Attributes:
        path: folder of the artifact.
        stamp: tells an artifact from another that took its place.
        max_batch_size: the largest of the compiled batch sizes to use; None for all.
        max_delay_us: batching delay; None for that of `serving` or the server.
        serving: how the model is served beside others.
        device: number of the device to run on; None for any.
    """

    path: str
    stamp: tuple[int, ...] = ()
    max_batch_size: int | None = None
    max_delay_us: int | None = None
    serving: Serving = Serving()
    device: int | None = None


class Change(msgspec.Struct, frozen=True):
    """A change of one model.

    Attributes:
        name: the model's.
        load: versions to load, or to load anew in place of what is loaded, ascending.
        retire: versions to take out.
        labels: what the labels stand on afterwards.
        traffic: how requests are shared afterwards.
    """

    name: str
    load: dict[str, Source] = {}
    retire: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    traffic: Traffic = Traffic()

    def without(self, failed: Collection[str], held: State) -> Change:
        """The change that is left if versions cannot be loaded: what is there stays, but for the versions that can."""
        if not failed:
            return self
        load = {version: source for version, source in self.load.items() if version not in failed}
        loaded = {*load, *held.versions}
        labels = {label: version for label, version in self.labels.items() if version in loaded}
        stay = {label: version for label, version in held.labels.items() if label in self.labels and version in loaded}
        return Change(self.name, load, (), stay | labels, self.traffic)


class State(msgspec.Struct, frozen=True):
    """The loaded versions of a model, its labels, and how requests are shared among them."""

    versions: dict[str, Source] = {}
    labels: dict[str, str] = {}
    traffic: Traffic = Traffic()

    def after(self, change: Change) -> State:
        """The state after a change."""
        versions = {**self.versions, **change.load}
        left = {key: each for key, each in versions.items() if key not in change.retire}
        return State(left, change.labels, change.traffic)


def wanted_state(found: Found | None, overrides: Mapping[str, int | None] | None = None) -> State:
    """What a repository asks for of a model; nothing where it holds none of that name.

    Args:
        found: what the repository holds.
        overrides: fields of `Source` that a client has set.
    """
    if found is None:
        return State()
    serving, more = found.settings.serving, overrides or {}
    versions = {
        version: Source(str(found.versions[version]), found.stamps[version], serving=serving, **more)
        for version in found.wanted
    }
    return State(versions, dict(found.settings.labels), found.plan.in_force)


def difference(name: str, held: State, wanted: State) -> Change | None:
    """The change from what is loaded to what is wanted; None if there is none.

    A label that is to stand on a version that is not there stays where it stands, and so does that version: or requests
    for `stable` would go to whatever is the greatest.

    >>> one, two = Source("digits/1.lepton"), Source("digits/2.lepton")
    >>> change = difference("digits", State({"1": one}), State({"2": two}, {"stable": "2", "canary": "9"}))
    >>> list(change.load), change.retire, change.labels
    (['2'], ('1',), {'stable': '2'})
    """
    load = {version: source for version, source in wanted.versions.items() if held.versions.get(version) != source}
    stands = {label: version for label, version in held.labels.items() if label in wanted.labels}
    labels = stands | {label: version for label, version in wanted.labels.items() if version in wanted.versions}
    keep = {*wanted.versions, *labels.values()}
    retire = tuple(version for version in held.versions if version not in keep)
    if not load and not retire and labels == held.labels and wanted.traffic == held.traffic:
        return None
    return Change(name, load, retire, labels, wanted.traffic)
