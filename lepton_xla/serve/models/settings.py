"""`model.toml`: which versions of a model are loaded, what its labels stand on, and how it is served."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

import msgspec

from lepton_xla import toml
from lepton_xla.errors import RepositoryError
from lepton_xla.serve.monitor.sampling import Sampling

SETTINGS = "model.toml"
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_LATEST = re.compile(r"latest:([1-9][0-9]{0,8})")

type _Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]
type _Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of structs that are read from a file; unknown or mistyped keys are errors."""


class Serving(_Struct, frozen=True, kw_only=True):
    """How a model is served beside others; None has the server's own option hold.

    Attributes:
        weight: share of device time beside other models.
        pinned: never evicted from memory.
        max_queue_rows: rows that may wait.
        max_queue_bytes: memory of the requests that may wait.
        max_delay_us: batching delay in microseconds.
        default_timeout_s: for requests that give no timeout.
        rate: requests per second; more are refused.
        max_concurrency: requests that may be under way.
        samples: how requests are sampled, where the server keeps samples.
    """

    weight: _Positive = 1.0
    pinned: bool = False
    max_queue_rows: _Count | None = None
    max_queue_bytes: _Count | None = None
    max_delay_us: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] | None = None
    default_timeout_s: _Positive | None = None
    rate: _Positive | None = None
    max_concurrency: _Count | None = None
    samples: Sampling = Sampling()


class ModelSettings(_Struct, frozen=True, kw_only=True):
    """The settings of a model; the defaults where there is no file.

    Attributes:
        versions: `latest:n`, `all`, or a tuple of versions.
        labels: label -> the version that it stands on.
        serving: how it is served.

    Raises:
        RepositoryError: kind `invalid`, for a policy, a version or a label of another form.

    >>> ModelSettings(versions="latest:2", labels={"stable": "3"}).wanted(["3", "9", "10", "11"])
    ('3', '10', '11')
    """

    versions: str | tuple[str, ...] = "latest:1"
    labels: dict[str, str] = {}
    serving: Serving = Serving()

    def __post_init__(self) -> None:
        if isinstance(self.versions, str):
            if self.versions != "all" and not _LATEST.fullmatch(self.versions):
                raise _invalid(
                    f"versions = {self.versions!r}: expected 'latest:1', 'all', or a list such as ['3', '4']"
                )
        else:
            for version in self.versions:
                check_version(version)
        for label, version in self.labels.items():
            check_label(label)
            check_version(version)

    def wanted(self, on_disk: Iterable[str], also: Iterable[str] = ()) -> tuple[str, ...]:
        """The versions to load, ascending: those of the policy, and those that a label stands on.

        Args:
            on_disk: the versions that are there; others are left out.
            also: versions that are wanted for other reasons; what is no version is passed over.
        """
        there = sorted(set(on_disk), key=int)
        if isinstance(self.versions, str):
            latest = _LATEST.fullmatch(self.versions)
            chosen = there[-int(latest[1]) :] if latest else there
        else:
            chosen = self.versions
        keep = {*chosen, *self.labels.values(), *also}
        return tuple(version for version in there if version in keep)


def parse_settings(text: str) -> ModelSettings:
    """Read the text of a `model.toml`.

    Raises:
        RepositoryError: kind `invalid`, naming the key.

    >>> parse_settings("[serving]\\nweight = 0")
    Traceback (most recent call last):
    lepton_xla.errors.RepositoryError: model.toml: Expected `float` > 0.0 - at `$.serving.weight`
    """
    try:
        return toml.parsed(text, ModelSettings)
    except (RepositoryError, ValueError) as error:
        raise _invalid(f"{SETTINGS}: {error}") from error


def check_version(version: str) -> str:
    """Return a version if it is a positive integer in decimal, without a leading zero.

    Raises:
        RepositoryError: kind `invalid`.

    >>> check_version("007")
    Traceback (most recent call last):
    lepton_xla.errors.RepositoryError: version '007': expected a positive integer such as 4, without leading zeros
    """
    if not is_version(version):
        raise _invalid(f"version {version!r}: expected a positive integer such as 4, without leading zeros")
    return version


def is_version(text: str) -> bool:
    """Whether a text is a version: 1 to 10**18 - 1, in ASCII digits."""
    return _VERSION.fullmatch(text) is not None


def check_label(label: str) -> str:
    """Return a label if it is a plain word.

    Raises:
        RepositoryError: kind `invalid`.

    >>> check_label("a/b")
    Traceback (most recent call last):
    lepton_xla.errors.RepositoryError: label 'a/b': use letters, digits, '_' and '-', at most 64, a letter first
    """
    if not _LABEL.fullmatch(label):
        raise _invalid(f"label {label!r}: use letters, digits, '_' and '-', at most 64, a letter first")
    return label


def _invalid(message: str) -> RepositoryError:
    return RepositoryError("invalid", message)
