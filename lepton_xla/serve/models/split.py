"""Which version answers a request that names none, where several share them."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Mapping
from typing import NamedTuple

from lepton_xla.serve.protocol.traffic import Traffic

BY_ID = "id"
"""The `sticky` that goes by the request's id."""


class Choice(NamedTuple):
    """The version that answers a request.

    Attributes:
        version: the version.
        propensity: the probability with which it was chosen.
    """

    version: str
    propensity: float


class Split:
    """Shares out the requests for one model.

    Args:
        model: its name.
        traffic: how they are shared.
        default: the version that answers for arms which are not loaded.
        versions: label or version -> loaded version.
        draw: gives a number from 0 to 1; for tests.

    Attributes:
        sticky: the header, in lower case, or `BY_ID`; empty if each request is drawn for.
        shares: version -> its share of the requests.
        shadow: the version that is asked too; None for none.
        fraction: of the requests that it is asked.

    >>> split = Split("digits", Traffic(shares={"stable": 0.75, "canary": 0.25}), "3", {"stable": "3", "canary": "4"})
    >>> split.shares, split.choose() in (Choice("3", 0.75), Choice("4", 0.25))
    ({'3': 0.75, '4': 0.25}, True)
    """

    def __init__(
        self,
        model: str,
        traffic: Traffic,
        default: str,
        versions: Mapping[str, str],
        draw: random.Random | None = None,
    ) -> None:
        self._draw = (random.Random() if draw is None else draw).random  # noqa: S311  # shares are no secrets
        self.sticky = traffic.sticky
        arms = {arm: share for arm, share in traffic.shares.items() if share} or {default: 1.0}
        self._arms = [
            (hashlib.sha256(f"{model}/{arm}".encode()).digest(), share, versions.get(arm, default))
            for arm, share in arms.items()
        ]
        self.shares: dict[str, float] = {}
        for _, share, version in self._arms:
            self.shares[version] = self.shares.get(version, 0.0) + share
        self._choices = [Choice(version, share) for version, share in self.shares.items()]
        self._bounds = list(itertools.accumulate(each.propensity for each in self._choices))[:-1]
        shadow = traffic.shadow
        self.shadow = None if shadow is None else versions.get(shadow.to)
        self.fraction = 0.0 if shadow is None else shadow.fraction

    def choose(self, key: bytes | None = None) -> Choice:
        """The version that answers a request.

        Args:
            key: what clients of one version have in common; None draws.
        """
        if len(self._choices) == 1:
            return self._choices[0]
        if key is None:
            return self._choices[bisect_right(self._bounds, self._draw())]
        version = max(self._arms, key=lambda arm: _score(key, arm[0], arm[1]))[2]
        return Choice(version, self.shares[version])

    def has_shadow(self, version: str) -> bool:
        """Whether the shadow may be asked too; it never is where it has answered."""
        return self.shadow is not None and self.shadow != version and self.fraction > 0

    def mirrors(self) -> bool:
        """Whether the shadow is asked too, of a version that has one."""
        return self.fraction == 1 or self._draw() < self.fraction


def _score(key: bytes, arm: bytes, share: float) -> float:
    """Weighted rendezvous hashing: if a share grows, keys only move to it; if it shrinks, they only leave it.

    Args:
        key: what clients of one version have in common.
        arm: a digest of the model's name and the arm's.
        share: of the arm.

    Source:
        Schindelhauer and Schomaker, "Weighted distributed hash tables", 2005.
    """
    digest = hashlib.blake2b(key, digest_size=6, key=arm)
    uniform = (int.from_bytes(digest.digest()) + 0.5) / 2**48
    return -share / math.log(uniform)
