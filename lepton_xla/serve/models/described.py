"""A repository as it is listed for people and clients."""

from __future__ import annotations

from typing import Any

from lepton_xla.copies import listing_of
from lepton_xla.errors import ArtifactError
from lepton_xla.serve.models.found import Found


def described(found: Found) -> dict[str, Any]:
    """What a repository holds of a model, as plain JSON: its versions with sizes and labels, and what is wrong."""
    versions: list[dict[str, Any]] = []
    problem = found.problem
    for version, path in found.versions.items():
        size_bytes, created = None, ""
        try:
            listing, _ = listing_of(path)
            size_bytes, created = listing.size_bytes, listing.created
        except ArtifactError as error:
            problem = problem or f"version {version}: {error}"
        labels = [label for label, stands in found.settings.labels.items() if stands == version]
        wanted = version in found.wanted
        versions.append(
            {"version": version, "size_bytes": size_bytes, "created": created, "wanted": wanted, "labels": labels}
        )
    return {"name": found.name, "problem": problem, "ignored": list(found.ignored), "versions": versions}
