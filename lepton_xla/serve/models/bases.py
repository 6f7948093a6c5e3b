"""Which version has the compiled code that a version of weights alone runs on."""

from __future__ import annotations

import pathlib

from lepton_xla.copies import listing_of
from lepton_xla.errors import ArtifactError, RepositoryError
from lepton_xla.listing import Listing
from lepton_xla.serve.models.found import Found


def base_of(update: Listing, found: Found, what: str) -> str:
    """The greatest version whose compiled code the weights of an update fit.

    Args:
        update: the update.
        found: the model.
        what: the update's name in errors.

    Raises:
        RepositoryError: kind `missing`, if there is none.
    """
    for version in reversed(found.versions):
        listing = _listed(found.versions[version])
        if listing is not None and not listing.is_update and listing.fit == update.fit:
            return version
    raise RepositoryError(
        "missing",
        f"{what} has weights only, and no version has the compiled code that they fit (fit {update.fit[:12]}): push "
        "the artifact that they were made for first",
    )


def refuse_needed(found: Found, version: str) -> None:
    """Refuse to remove the only version with the code that the weights of another run on.

    Raises:
        RepositoryError: kind `conflict`, naming the other.
    """
    gone = _listed(found.versions[version])
    if gone is None or gone.is_update:
        return
    listings = {other: _listed(path) for other, path in found.versions.items() if other != version}
    alike = {other: each for other, each in listings.items() if each is not None and each.fit == gone.fit}
    needing = [other for other, each in alike.items() if each.is_update]
    if needing and len(needing) == len(alike):
        raise RepositoryError(
            "conflict",
            f"version {version} of model {found.name!r} has the compiled code that version {needing[-1]} runs on, "
            "which has weights only: remove that first",
        )


def _listed(path: pathlib.Path) -> Listing | None:
    """What an artifact lists; None if its manifest cannot be read."""
    try:
        return listing_of(path)[0]
    except ArtifactError:
        return None
