"""Uploads to a repository: pieces of files named by their digest, kept on disk until an artifact is made of them.

Nothing of an upload is seen in the repository before all of it has been checked. A client that was cut off asks how far
it got, and goes on from there; several may send the same file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence

from lepton_xla.errors import ArtifactError, RepositoryError
from lepton_xla.files.copies import write_whole
from lepton_xla.files.folders import flush, held
from lepton_xla.files.listing import MANIFEST, MAX_MANIFEST_BYTES, FileEntry, Listing, is_sha256, read_listing
from lepton_xla.serve.models.repository import Repository
from lepton_xla.trust.bundles import MAX_SIGNATURE_BYTES, SIGNATURE

FOLDER = ".uploads"


@dataclasses.dataclass(frozen=True, slots=True)
class UploadLimits:
    """Bounds on what waits to become an artifact, and on one artifact.

    Attributes:
        max_bytes: bytes of all files together.
        max_files: number of files.
        max_age_s: files that nobody sent a piece of for so long are removed.
    """

    max_bytes: int = 64 << 30
    max_files: int = 10_000
    max_age_s: float = 24 * 3600.0


class Uploads:
    """Files that were sent to a repository and are in no version yet. Threads and processes may share the folder.

    Args:
        repository: where artifacts go.
        limits: bounds on what is kept.
        clock: gives seconds since 1970, as file systems do.

    >>> uploads = Uploads(Repository("models"))
    >>> digest = hashlib.sha256(b"hello").hexdigest()
    >>> uploads.write(digest, 0, b"hel"), uploads.write(digest, 3, b"lo"), uploads.sizes([digest])[digest]
    (3, 5, 5)
    """

    def __init__(
        self,
        repository: Repository,
        limits: UploadLimits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._repository = repository
        self._limits = limits or UploadLimits()
        self._clock = clock
        self._folder = repository.root / FOLDER

    def sizes(self, digests: Sequence[str]) -> dict[str, int]:
        """How many bytes of each file are here.

        Raises:
            RepositoryError: kind `invalid`, if one is no SHA-256.
        """
        return {digest: _size(self._file(digest)) for digest in digests}

    def write(self, digest: str, offset: int, data: bytes | memoryview) -> int:
        """Append a piece to a file.

        Args:
            digest: the SHA-256 of the whole file, by which it is named.
            offset: how many bytes of it are here.
            data: the piece.

        Returns:
            How many bytes of it are here now.

        Raises:
            RepositoryError: `invalid` for what is no SHA-256, `conflict` if another number of bytes is here, `failed`
                if the disk or the bounds are full; of the piece, nothing is kept then.
        """
        file = self._file(digest)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with held(self._folder, wait=True):
                self._make_room(file, len(data))
                size = _size(file)
                if size != offset:
                    raise RepositoryError("conflict", f"{digest}: {size} bytes are here, not {offset}: go on there")
                with open(file, "ab", buffering=0) as opened:  # a buffer would be written again on closing
                    left = memoryview(data)
                    try:
                        while left:
                            left = left[opened.write(left) :]
                    except OSError:
                        os.ftruncate(opened.fileno(), size)
                        raise
                return size + len(data)
        except OSError as error:
            raise RepositoryError("failed", f"{digest}: cannot be written: {error.strerror or error}") from error

    def publish(
        self, manifest: str, name: str, version: str | None = None, signature: str | None = None
    ) -> tuple[str, Listing]:
        """Make a version of uploaded files.

        Args:
            manifest: digest of the uploaded manifest; it lists the others.
            name: the model's name in the repository.
            version: a version that is not there; by default one more than the greatest.
            signature: digest of the uploaded signature file, if there is one; whoever loads the version checks it.

        Returns:
            The version, and what its manifest lists.

        Raises:
            RepositoryError: `missing` naming files that are not here as a whole, else as `Repository.push`.
            ArtifactError: if a file is not what its digest says; it is removed, so that it can be sent again.
        """
        with self._repository.stage(name, version) as staged:
            listing = self.assemble(manifest, name, staged, signature)
            published = self._repository.commit(staged, name, version)
        self.forget(manifest, signature)
        return published, listing

    def assemble(self, manifest: str, name: str, staged: pathlib.Path, signature: str | None = None) -> Listing:
        """Make an artifact of uploaded files in an empty folder of the repository.

        Raises:
            RepositoryError, ArtifactError: as `publish`.
        """
        data = self._small(manifest, MAX_MANIFEST_BYTES)
        listing = read_listing(data)
        limits = self._limits
        if len(listing.files) > limits.max_files or listing.size_bytes > limits.max_bytes:
            raise ArtifactError(
                f"the manifest lists {len(listing.files)} files of {listing.size_bytes} bytes; one that is sent "
                f"may have {limits.max_files} files of {limits.max_bytes} bytes"
            )
        signed = None if signature is None else self._small(signature, MAX_SIGNATURE_BYTES)
        self._repository.check_base(listing, name)
        taken = self._take(listing, staged)
        for file, entry in listing.files.items():
            _check(entry, staged / file, taken.get(entry.sha256, staged / file))
        if signed is not None:
            write_whole(staged / SIGNATURE, signed)
        write_whole(staged / MANIFEST, data)
        return listing

    def forget(self, *digests: str | None) -> None:
        """Remove files that an artifact was made of and that are here still."""
        for digest in filter(None, digests):
            with contextlib.suppress(OSError):
                self._file(digest).unlink()

    def _small(self, digest: str, limit: int) -> bytes:
        """The content of a file that is read into memory."""
        try:
            with open(self._file(digest), "rb") as opened:
                data = opened.read(limit + 1)
        except FileNotFoundError:
            raise _missing([digest]) from None
        if len(data) > limit:
            raise ArtifactError(f"{digest}: more than the limit of {limit} bytes")
        if hashlib.sha256(data).hexdigest() != digest:
            raise _missing([digest])
        return data

    def _take(self, listing: Listing, staged: pathlib.Path) -> dict[str, pathlib.Path]:
        """Move all files into an artifact, or none: of several who publish the same, one has them.

        Returns:
            Where each is now, by digest; an artifact that has one twice has it in the first place. Empty ones are not
            taken from anywhere.
        """
        first: dict[str, pathlib.Path] = {}
        for file, entry in listing.files.items():
            if entry.size:
                first.setdefault(entry.sha256, staged / file)
        wanted = {entry.sha256: entry.size for entry in listing.files.values() if entry.size}
        with held(self._folder, wait=True):
            # Sizes are checked before anything is moved, so that what is here stays for the next try.
            lacking = [digest for digest, size in wanted.items() if _size(self._file(digest)) < size]
            if lacking:
                raise _missing(lacking)
            for digest in wanted:
                first[digest].parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.rename(self._file(digest), first[digest])
                except FileNotFoundError:  # where the file system has no locks, another was first
                    raise _missing([digest]) from None
        return first

    def _make_room(self, file: pathlib.Path, more: int) -> None:
        """Remove files that nobody goes on with, and refuse what is too much then."""
        total, count, now = 0, 0, self._clock()
        for entry in os.scandir(self._folder):
            status = entry.stat(follow_symlinks=False)
            if now - status.st_mtime > self._limits.max_age_s and entry.name != file.name:
                os.unlink(entry.path)
                continue
            total, count = total + status.st_size, count + 1
        count += not file.exists()
        if total + more > self._limits.max_bytes or count > self._limits.max_files:
            raise RepositoryError(
                "failed",
                f"uploads hold {total} bytes in {count} files; at most {self._limits.max_bytes} bytes in "
                f"{self._limits.max_files} files may wait: finish one, or wait for old ones to be removed",
            )

    def _file(self, digest: str) -> pathlib.Path:
        if not is_sha256(digest):
            raise RepositoryError("invalid", f"{digest[:80]!r} is no SHA-256: 64 hexadecimal digits in lower case")
        return self._folder / digest


def _size(file: pathlib.Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _digest(file: pathlib.Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check(entry: FileEntry, target: pathlib.Path, there: pathlib.Path) -> None:
    """Check a file in its place in an artifact, where nobody can append to it any more.

    Args:
        entry: what the manifest says of it.
        target: its place.
        there: where its bytes are: no second copy, however often the artifact has them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if not entry.size:
        target.touch()
    elif there != target:
        if _size(there) != entry.size:
            raise ArtifactError(f"{entry.sha256}: the manifest lists it with two sizes")
        try:
            os.link(there, target)
        except OSError:  # a file system without links
            shutil.copyfile(there, target)
            flush(target)
    elif _size(target) != entry.size or _digest(target) != entry.sha256:
        raise ArtifactError(f"{entry.sha256}: what was sent is something else: send it again")
    else:
        flush(target)


def _missing(digests: Sequence[str]) -> RepositoryError:
    more = f", and {len(digests) - 1} more" if len(digests) > 1 else ""
    return RepositoryError("missing", f"file {digests[0]} was not sent as a whole{more}")
