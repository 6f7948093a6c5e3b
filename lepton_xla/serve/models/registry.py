"""Which model answers for a name and a version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.models.split import Split
from lepton_xla.serve.protocol.signature import is_safe
from lepton_xla.serve.protocol.traffic import Traffic

STABLE = "stable"
"""The label whose version answers requests that name none."""


def _rank(version: str) -> tuple[int, int, str]:
    """The order of versions: by number; what is no number comes before all that are."""
    return (1, int(version), "") if version.isdecimal() else (0, 0, version)


class Registry:
    """The models of a server by name and version. Used on the event loop only.

    Args:
        handles: the first ones.

    Attributes:
        generation: grows with each change. What was found in an earlier generation has to be looked up again.
    """

    def __init__(self, *handles: ModelHandle) -> None:
        self.generation = 0
        self._models: dict[str, dict[str, ModelHandle]] = {}
        self._labels: dict[str, dict[str, str]] = {}
        self._traffic: dict[str, Traffic] = {}
        self._splits: dict[str, tuple[int, Split | None]] = {}
        for handle in handles:
            self.put(handle)

    def __iter__(self) -> Iterator[ModelHandle]:
        return (handle for versions in self._models.values() for handle in versions.values())

    def put(self, handle: ModelHandle) -> None:
        """Adds a model, or puts it in the place of the one with its name and version.

        What is under way ends where it began.
        """
        self._models.setdefault(handle.signature.name, {})[handle.signature.version] = handle
        self.generation += 1

    def remove(self, handle: ModelHandle) -> bool:
        """Takes a model out, and the labels that stand on its version; returns whether it was there.

        What is under way ends where it began.
        """
        name, version = handle.signature.name, handle.signature.version
        versions = self._models.get(name, {})
        if versions.get(version) is not handle:
            return False
        del versions[version]
        labels = self._labels.get(name, {})
        self._labels[name] = {label: stands for label, stands in labels.items() if stands != version}
        if not versions:
            del self._models[name]
            del self._labels[name]
            self._traffic.pop(name, None)
            self._splits.pop(name, None)
        self.generation += 1
        return True

    def get(self, name: str, version: str) -> ModelHandle | None:
        """A version of a model, if it is there."""
        return self._models.get(name, {}).get(version)

    def label(self, name: str, labels: Mapping[str, str]) -> None:
        """Sets the labels of a model: label -> version. Those whose version is not loaded are left out."""
        versions = self._models.get(name, {})
        loaded = {label: version for label, version in labels.items() if version in versions}
        if versions and loaded != self._labels.get(name, {}):
            self._labels[name] = loaded
            self.generation += 1

    def labels(self, name: str | None = None) -> dict[str, str]:
        """The labels of a model, or of all models: label -> version."""
        names = self._labels if name is None else (name,)
        return {label: version for each in names for label, version in self._labels.get(each, {}).items()}

    def share(self, name: str, traffic: Traffic) -> None:
        """Sets how requests that name no version of a model are shared among its versions."""
        if name in self._models and traffic != self.traffic(name):
            self._traffic[name] = traffic
            self.generation += 1

    def traffic(self, name: str) -> Traffic:
        """How requests that name no version of a model are shared."""
        return self._traffic.get(name, Traffic())

    def split(self, name: str) -> Split | None:
        """What shares the requests of a model out among its loaded versions; None if one answers all and no other is
        asked.
        """
        if name not in self._traffic:
            return None
        known = self._splits.get(name)
        if known is None or known[0] != self.generation:
            made = None
            versions, traffic = self._models[name], self._traffic[name]
            if traffic != Traffic():
                default = self.find(name).signature.version
                made = Split(
                    name, traffic, default, {**self._labels.get(name, {}), **{each: each for each in versions}}
                )
            known = self._splits[name] = self.generation, made
        return known[1]

    def names(self) -> list[str]:
        """The names of the models."""
        return list(self._models)

    def versions(self, name: str) -> list[str]:
        """The versions of a model, ascending."""
        return sorted(self._models.get(name, ()), key=_rank)

    def find(self, name: str, version: str | None = None, label: str | None = None) -> ModelHandle:
        """The model of a name, of a version or a label if one is given.

        Without either it is the version that the label `stable` stands on, or else the greatest.

        Raises:
            HTTPError: 404 where there is none.
        """
        # The errors are in Triton's words, which its clients look for.
        versions = self._models.get(name)
        if versions is None:
            known = f": {name!r} is not found" if is_safe(name) else ""
            raise HTTPError(404, f"Request for unknown model{known}")
        if label is not None:
            version = self._labels.get(name, {}).get(label)
            if version is None:
                known = f" label {label!r} is not found" if is_safe(label) else " has no such label"
                raise HTTPError(404, f"Request for unknown model: {name!r}{known}")
        if version is None:
            version = self._labels.get(name, {}).get(STABLE) or max(versions, key=_rank)
        handle = versions.get(version)
        if handle is None:
            known = f" version {version!r} is not found" if is_safe(version) else " has no such version"
            raise HTTPError(404, f"Request for unknown model: {name!r}{known}")
        return handle
