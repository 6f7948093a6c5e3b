"""A repository as it is listed for people and clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lepton_xla.errors import ArtifactError
from lepton_xla.files.listing import Listing
from lepton_xla.serve.models.found import Found


def described(found: Found, read: Callable[[Found, str], Listing]) -> dict[str, Any]:
    """What a repository holds of a model, as plain JSON: its versions with sizes and labels, and what is wrong.

    Args:
        found: the model.
        read: reads what a version lists; may raise `ArtifactError`.
    """
    versions: list[dict[str, Any]] = []
    problem = found.problem
    for version in found.versions:
        size_bytes, created = None, ""
        try:
            listing = read(found, version)
            size_bytes, created = listing.size_bytes, listing.created
        except ArtifactError as error:
            problem = problem or f"version {version}: {error}"
        labels = [label for label, stands in found.settings.labels.items() if stands == version]
        wanted = version in found.wanted
        versions.append(
            {"version": version, "size_bytes": size_bytes, "created": created, "wanted": wanted, "labels": labels}
        )
    return {"name": found.name, "problem": problem, "ignored": list(found.ignored), "versions": versions}
