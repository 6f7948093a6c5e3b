"""Which model answers for a name and a version."""

from __future__ import annotations

from collections.abc import Iterator

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.protocol.signature import is_safe


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
        for handle in handles:
            self.put(handle)

    def __iter__(self) -> Iterator[ModelHandle]:
        return (handle for versions in self._models.values() for handle in versions.values())

    def put(self, handle: ModelHandle) -> None:
        """Adds a model, or puts it in the place of the one with its name and version.

        Requests that name no version get the one that was put last. What is under way ends where it began.
        """
        versions = self._models.setdefault(handle.signature.name, {})
        versions.pop(handle.signature.version, None)
        versions[handle.signature.version] = handle
        self.generation += 1

    def versions(self, name: str) -> list[str]:
        """The versions of a model, in the order they were put."""
        return list(self._models.get(name, ()))

    def find(self, name: str, version: str | None = None) -> ModelHandle:
        """The model of a name, of a version if one is given.

        Raises:
            HTTPError: 404 where there is none.
        """
        # The errors are in Triton's words, which its clients look for.
        versions = self._models.get(name)
        if versions is None:
            known = f": {name!r} is not found" if is_safe(name) else ""
            raise HTTPError(404, f"Request for unknown model{known}")
        if version is None:
            return next(reversed(versions.values()))
        handle = versions.get(version)
        if handle is None:
            known = f" version {version!r} is not found" if is_safe(version) else " has no such version"
            raise HTTPError(404, f"Request for unknown model: {name!r}{known}")
        return handle
