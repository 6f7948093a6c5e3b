"""Keeps an old signed artifact from coming back as a new version: whoever may write to a repository need not be able to
sign, and an old artifact is signed as well as the newest."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lepton_xla.errors import ArtifactError

if TYPE_CHECKING:
    from lepton_xla.trust.keys import TrustedKeys

# Lower versions on the disk whose signatures are read.
_MOST_READ = 16
_VERSION = re.compile(r"([1-9][0-9]{0,18})\.lepton")


class SigningTimes:
    """When the versions of models were signed, as far as this process has seen.

    Args:
        trust: a public key, or a folder of them.
    """

    def __init__(self, trust: str | os.PathLike[str]) -> None:
        self._trust = trust
        # Kept when a version is gone, since whoever pushes an old artifact may remove the newer ones first.
        self._known: dict[str, dict[int, float]] = {}

    def keys_for(self, name: str, version: str, path: str) -> TrustedKeys:
        """The trusted keys, which trust no signature that is older than that of this version or a lower one was.

        Args:
            name, version: of what is to be loaded.
            path: where it lies, beside other versions.

        Raises:
            TrustError: if the keys cannot be read.
        """
        from lepton_xla.compiler.opening import trusted_keys

        trusted = trusted_keys(self._trust)
        assert trusted is not None
        if not version.isdecimal():
            return trusted
        known = self._known.setdefault(name, {})
        found = (each for each in Path(path).parent.glob("*.lepton") if _VERSION.fullmatch(each.name))
        lower = sorted(int(each.stem) for each in found if int(each.stem) < int(version))
        for number in lower[-_MOST_READ:]:
            self._note(known, number, str(Path(path).with_name(f"{number}.lepton")), trusted)
        times = [signed_s for number, signed_s in known.items() if number <= int(version)]
        if trusted.not_before_s is not None:
            times.append(trusted.not_before_s)
        return dataclasses.replace(trusted, not_before_s=max(times, default=None))

    def loaded(self, name: str, version: str, path: str, trusted: TrustedKeys) -> None:
        """Told of a version that is loaded, and with which keys."""
        if version.isdecimal():
            self._note(self._known.setdefault(name, {}), int(version), path, trusted)

    @staticmethod
    def _note(known: dict[int, float], number: int, path: str, trusted: TrustedKeys) -> None:
        from lepton_xla.compiler.opening import read_signature
        from lepton_xla.compiler.storage import Store

        with contextlib.suppress(ArtifactError):  # what nobody signed says nothing
            signed_s = read_signature(Store(path), trusted).signed_s
            if signed_s is not None:
                known[number] = max(signed_s, known.get(number, signed_s))
