"""What a `model.toml` says of samples: which requests are kept, what of them, and how long."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import msgspec

from lepton_xla.errors import SampleError


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How requests of a model are sampled, where the server keeps samples.

    Attributes:
        rate: of the requests with an id, the share that is kept; None has the server's option hold.
        drop: inputs and outputs that are not kept.
        hash: inputs and outputs of which each row's keyed hash is kept in place of the values.
        hash_id: whether the id's keyed hash is kept in its place.
        max_bytes: of all samples of the model on the disk; the oldest go first.
        max_age_s: how long they are kept.
    """

    rate: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    drop: tuple[str, ...] = ()
    hash: tuple[str, ...] = ()
    hash_id: bool = False
    max_bytes: Annotated[int, msgspec.Meta(ge=1 << 16, le=1 << 53)] = 1 << 30
    max_age_s: Annotated[float, msgspec.Meta(gt=0, le=1e12)] = 7 * 24 * 3600.0

    def check(self, names: Collection[str]) -> None:
        """Check the names of fields against those of a model.

        Args:
            names: of its inputs and outputs.

        Raises:
            SampleError: for one that the model does not have: a misspelled name would keep what should be dropped.

        >>> Sampling(drop=("user",)).check(["image", "output"])
        Traceback (most recent call last):
        lepton_xla.errors.SampleError: samples: drop or hash names 'user', which the model does not have; ...
        """
        for name in (*self.drop, *self.hash):
            if name not in names:
                raise SampleError(
                    f"samples: drop or hash names {name!r}, which the model does not have; it has {', '.join(names)}"
                )
