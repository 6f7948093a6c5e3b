"""Which version has the compiled code that a version of weights alone runs on."""

from __future__ import annotations

from collections.abc import Mapping

from lepton_xla.errors import RepositoryError
from lepton_xla.files.listing import Listing


def base_of(update: Listing, listings: Mapping[str, Listing | None], what: str) -> str:
    """The greatest version whose compiled code the weights of an update fit.

    Args:
        update: the update.
        listings: by version, what each lists; None if its manifest cannot be read.
        what: the update's name in errors.

    Raises:
        RepositoryError: kind `missing`, if there is none.
    """
    for version in sorted(listings, key=int, reverse=True):
        listing = listings[version]
        if listing is not None and not listing.is_update and listing.fit == update.fit:
            return version
    raise RepositoryError(
        "missing",
        f"{what} has weights only, and no version has the compiled code that they fit (fit {update.fit[:12]}): push "
        "the artifact that they were made for first",
    )


def refuse_needed(name: str, version: str, listings: Mapping[str, Listing | None]) -> None:
    """Refuse to remove the only version with the code that the weights of another run on.

    Args:
        name: the model's.
        version: what is to be removed.
        listings: by version, what each lists; None if its manifest cannot be read.

    Raises:
        RepositoryError: kind `conflict`, naming the other.
    """
    gone = listings[version]
    if gone is None or gone.is_update:
        return
    others = {other: each for other, each in listings.items() if other != version}
    alike = {other: each for other, each in others.items() if each is not None and each.fit == gone.fit}
    needing = [other for other, each in alike.items() if each.is_update]
    if needing and len(needing) == len(alike):
        raise RepositoryError(
            "conflict",
            f"version {version} of model {name!r} has the compiled code that version {needing[-1]} runs on, "
            "which has weights only: remove that first",
        )
