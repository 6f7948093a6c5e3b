"""A repository of models in an object store, by fsspec, with a copy on the disk of what is served from it.

The copy is a repository in a folder itself, and what is served is read from it. `scan` brings it up to date: versions
that are wanted are fetched, each file checked against its digest, and appear in it whole. A version exists in the store
once its manifest does, which is written last. A store has no locks: of two that move a label at once, the last wins.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Generator
from typing import Any
from urllib.parse import unquote

from lepton_xla.errors import ArtifactError, RepositoryError, first_line
from lepton_xla.files.copies import listing_of, signature_of, write_whole
from lepton_xla.files.folders import flush
from lepton_xla.files.listing import MANIFEST, MAX_MANIFEST_BYTES, Listing, read_listing
from lepton_xla.serve.models.bases import base_of
from lepton_xla.serve.models.found import Found
from lepton_xla.serve.models.plans import PLAN, read_plan
from lepton_xla.serve.models.repository import SUFFIX, Repository, check_model_name
from lepton_xla.serve.models.settings import SETTINGS, ModelSettings, check_version, is_version
from lepton_xla.serve.protocol.traffic import Plan
from lepton_xla.trust.bundles import MAX_SIGNATURE_BYTES, SIGNATURE

_log = logging.getLogger("lepton_xla.serve")

_MAX_TEXT_BYTES = 1 << 20
_CLAIM = ".claim"


class RemoteRepository(Repository):
    """Models under a prefix of an object store: `gs://`, `s3://`, `az://`, or any other that fsspec knows.

    Args:
        url: the prefix.
        cache: folder for the copy; by default one in `$LEPTON_CACHE`, `$XDG_CACHE_HOME` or `~/.cache`. It lasts as long
            as this process if `LEPTON_CACHE=off`.

    Raises:
        RepositoryError: kind `invalid`, if the package for such addresses is not installed, or the address is none.
    """

    def __init__(self, url: str, cache: str | os.PathLike[str] | None = None) -> None:
        digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
        super().__init__(pathlib.Path(cache) if cache is not None else _default_cache() / digest)
        self.location = url
        self._fs, self._path = _file_system(url)
        self._manifests: dict[str, tuple[Any, bytes]] = {}
        self._verified: set[pathlib.Path] = set()

    def scan(self) -> dict[str, Found]:
        """Look at all models, by name, and fetch the versions that are wanted.

        A model of which something cannot be fetched has a `problem`.

        Raises:
            RepositoryError: kind `failed`, if the store cannot be reached, or nothing is there: an address that is
                wrong must not look like a repository from which all models were removed.
        """
        names = self._model_names()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for name in os.listdir(self.root):
                if name not in names and not name.startswith("."):
                    shutil.rmtree(self.root / name, ignore_errors=True)
        except OSError as error:
            raise RepositoryError(
                "failed",
                f"{self.root}: the copy of {self.location} cannot be kept there: {error.strerror or error}; "
                "LEPTON_CACHE names another folder",
            ) from error
        found: dict[str, Found] = {}
        for name in names:
            try:
                looked = self._look(name)
            except RepositoryError as error:  # hides no other
                looked = Found(name, problem=str(error))
            if looked is not None:
                found[name] = self._fetched(looked)
        return found

    def push(self, artifact: str | os.PathLike[str], name: str, version: str | None = None) -> str:
        """Send an artifact, its manifest last; the arguments and errors are those of `Repository.push`.

        A push that is cut off leaves files without a manifest, which is no version; its number stays taken.
        """
        folder = pathlib.Path(artifact)
        check_model_name(name)
        if version is not None:
            check_version(version)
        listing, data = listing_of(folder)
        self.check_base(listing, name)
        claimed = self._claim(name, version)
        prefix = f"{name}/{claimed}{SUFFIX}"
        for file, entry in listing.files.items():
            if _digest(folder, file) != entry.sha256:
                self._remove_all(prefix)
                raise ArtifactError(f"{folder}: {file} is damaged: its SHA-256 differs from the manifest's")
            with self._asked(f"{prefix}/{file} cannot be written"):
                self._fs.put_file(str(folder / file), self._at(f"{prefix}/{file}"))
        signature = signature_of(folder)
        with self._asked(f"{prefix} cannot be written"):
            if signature is not None:
                self._fs.pipe_file(self._at(f"{prefix}/{SIGNATURE}"), signature)
            self._fs.pipe_file(self._at(f"{prefix}/{MANIFEST}"), data)
        return claimed

    def _claim(self, name: str, version: str | None) -> str:
        """Take a number for a version, so that two pushes at once cannot mix their files."""
        while True:
            taken = [each.removesuffix(SUFFIX) for each in self._names(name) if each.endswith(SUFFIX)]
            number = version or str(max(map(int, filter(is_version, taken)), default=0) + 1)
            if number in taken:
                raise RepositoryError(
                    "conflict", f"model {name!r} has a version {number}, or a push of it was cut off; push another"
                )
            try:
                with self._asked(f"{name}/{number}{SUFFIX} cannot be written", FileExistsError):
                    self._fs.pipe_file(self._at(f"{name}/{number}{SUFFIX}/{_CLAIM}"), b"-", mode="create")
            except FileExistsError:
                continue
            return number

    # What the store says, for the methods of the base class.

    def _model_names(self) -> list[str]:
        return sorted(name for name, is_folder in self._names("").items() if is_folder and not name.startswith("."))

    def _look(self, name: str) -> Found | None:
        """What is there of a model; paths are those in the copy, whether they are fetched or not."""
        try:
            check_model_name(name)
        except RepositoryError as error:
            return Found(name, problem=str(error))
        versions: dict[str, pathlib.Path] = {}
        ignored: list[str] = []
        names = self._names(name)
        for entry in sorted(each for each in names if each.endswith(SUFFIX)):
            version = entry.removesuffix(SUFFIX)
            if is_version(version) and MANIFEST in self._names(f"{name}/{entry}"):
                versions[version] = self.root / name / entry
            else:
                ignored.append(entry)
        settings, plan, problem = ModelSettings(), Plan(), None
        try:
            settings = self._settings(name)
            plan = read_plan(self._read(name, PLAN)) if PLAN in names else plan
        except RepositoryError as error:
            problem = str(error)
        if not (versions or ignored or problem or SETTINGS in names):
            return None
        ascending = {version: versions[version] for version in sorted(versions, key=int)}
        return Found(name, ascending, settings, problem, {}, tuple(ignored), plan)

    def _read(self, name: str, file: str) -> str | None:
        data = self._bytes(f"{name}/{file}", _MAX_TEXT_BYTES)
        try:
            return None if data is None else data.decode()
        except UnicodeDecodeError as error:
            raise RepositoryError("invalid", f"{name}/{file}: is not UTF-8 text: {error.reason}") from error

    def _write(self, name: str, file: str, data: bytes) -> None:
        with self._asked(f"{name}/{file} cannot be written"):
            self._fs.pipe_file(self._at(f"{name}/{file}"), data)

    def _delete(self, name: str, version: str) -> None:
        prefix = f"{name}/{version}{SUFFIX}"
        with self._asked(f"{prefix} cannot be removed"):
            self._fs.rm_file(self._at(f"{prefix}/{MANIFEST}"))  # first: without it there is no version
        self._remove_all(prefix)

    def _read_listing(self, found: Found, version: str) -> Listing:
        return self._manifest(found.name, version)[0]

    @contextlib.contextmanager
    def _locked(self, name: str) -> Generator[None, None, None]:
        check_model_name(name)
        yield

    # The copy.

    def replan(self, name: str, change: Callable[[Plan, Found], Plan]) -> Plan:
        """As `Repository.replan`, for what needs nobody to carry it out: shares that stay.

        Raises:
            RepositoryError: also `invalid` for a rollout that begins, or a bandit.
        """

        def stays(plan: Plan, found: Found) -> Plan:
            after = change(plan, found)
            begins = after.rollout is not None and after.rollout.running and after.rollout != plan.rollout
            if begins or after.traffic.bandit is not None:
                what = "rollouts are" if begins else "bandits are"
                raise RepositoryError(
                    "invalid",
                    f"{self.location}: {what} carried out by a server of a repository in a folder; in an object store "
                    "set shares with leptonx traffic, and change them by hand",
                )
            return after

        return super().replan(name, stays)

    def find_base(self, name: str, version: str) -> pathlib.Path | None:
        """As `Repository.find_base`; the artifact is in the copy, because `scan` fetched it with the version."""
        return Repository(self.root).find_base(name, version)

    def find(self, name: str) -> Found:
        """As `Repository.find`; fetches the versions that are wanted.

        Raises:
            RepositoryError: also `failed`, if the store cannot be reached.
        """
        return self._fetched(self._existing(name))

    def _fetched(self, found: Found) -> Found:
        """What is there of a model, when all that is wanted of it has been fetched, and what is not is gone."""
        if found.problem:
            return found
        name, problem = found.name, None
        needed: set[str] = set()
        for version in found.wanted:
            needed.add(version)
            try:
                listing, data = self._manifest(name, version)
                self._fetch(name, version, listing, data)
                if listing.is_update:
                    base = base_of(listing, self._listings(found), f"version {version} of model {name!r}")
                    needed.add(base)
                    self._fetch(name, base, *self._manifest(name, base))
            except (RepositoryError, ArtifactError, OSError) as error:
                problem = problem or f"version {version} cannot be fetched: {error}"
        local = Repository(self.root)
        there = local._look(name)  # the same class
        try:
            for version in () if there is None or problem else there.versions:
                if version not in needed:
                    local._delete(name, version)
        except OSError as error:
            problem = f"what is not wanted cannot be removed from the copy: {error.strerror or error}"
        stamps = {} if there is None else {version: there.stamps[version] for version in needed & set(there.stamps)}
        return Found(name, found.versions, found.settings, problem, stamps, found.ignored, found.plan)

    def _fetch(self, name: str, version: str, listing: Listing, manifest: bytes) -> None:
        """Have a version in the copy, whole."""
        local, folder = Repository(self.root), self.root / name / f"{version}{SUFFIX}"
        signature = self._bytes(f"{name}/{version}{SUFFIX}/{SIGNATURE}", MAX_SIGNATURE_BYTES)
        try:
            if (folder / MANIFEST).read_bytes() == manifest and signature_of(folder) == signature:
                if folder in self._verified or _is_whole(folder, listing):
                    self._verified.add(folder)
                    return
                _log.warning("the copy of %s/%s is damaged, and is fetched again", name, version)
            local._delete(name, version)  # another has taken its place
        except FileNotFoundError:
            pass
        self._verified.discard(folder)
        with local.stage(name, version) as staged:
            for file, entry in listing.files.items():
                target = staged / file
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with self._asked(f"{name}/{version}{SUFFIX}/{file} cannot be read", FileNotFoundError):
                        self._fs.get_file(self._at(f"{name}/{version}{SUFFIX}/{file}"), str(target))
                except FileNotFoundError:
                    raise ArtifactError(f"{file} is missing") from None
                if target.stat().st_size != entry.size or _digest(staged, file) != entry.sha256:
                    raise ArtifactError(f"{file} is damaged: its size or SHA-256 differs from the manifest's")
                flush(target)
            if signature is not None:
                write_whole(staged / SIGNATURE, signature)
            write_whole(staged / MANIFEST, manifest)
            local._put(staged, name, version)
        self._verified.add(folder)

    # The store.

    def _manifest(self, name: str, version: str) -> tuple[Listing, bytes]:
        """The manifest of a version, read again only if the store says that it is another."""
        path = f"{name}/{version}{SUFFIX}/{MANIFEST}"
        with self._asked(f"{path} cannot be read"):
            key = self._fs.ukey(self._at(path))
        known = self._manifests.get(path)
        if known is None or known[0] != key:
            data = self._bytes(path, MAX_MANIFEST_BYTES)
            if data is None:
                raise ArtifactError(f"{path} is missing")
            known = self._manifests[path] = (key, data)
        return read_listing(known[1]), known[1]

    def _names(self, path: str) -> dict[str, bool]:
        """What is directly under a path: name -> whether it is a folder."""
        try:
            with self._asked("cannot be listed", None if path == "" else FileNotFoundError):
                self._fs.invalidate_cache()
                entries = self._fs.ls(self._at(path), detail=True)
        except FileNotFoundError:
            return {}
        return {each["name"].rstrip("/").rpartition("/")[2]: each["type"] == "directory" for each in entries}

    def _bytes(self, path: str, limit: int) -> bytes | None:
        """A file of the store; None if there is none."""
        try:
            with self._asked(f"{path} cannot be read", FileNotFoundError):
                data = self._fs.cat_file(self._at(path), start=0, end=limit + 1)
        except FileNotFoundError:
            return None
        if len(data) > limit:
            raise RepositoryError("invalid", f"{path}: more than the limit of {limit} bytes")
        return data

    def _remove_all(self, prefix: str) -> None:
        with (
            contextlib.suppress(FileNotFoundError),
            self._asked(f"{prefix} cannot be removed", FileNotFoundError),
        ):
            self._fs.rm(self._at(prefix), recursive=True)

    def _at(self, path: str) -> str:
        return f"{self._path}/{path}".rstrip("/")

    @contextlib.contextmanager
    def _asked(self, what: str, passing: type[OSError] | None = None) -> Generator[None, None, None]:
        """Turn what a store raises, which is anything, into an error of ours; only `passing` passes."""
        try:
            yield
        except Exception as error:
            if passing is not None and isinstance(error, passing):
                raise
            reason = "nothing is there" if isinstance(error, FileNotFoundError) else first_line(error)
            raise RepositoryError("failed", f"{self.location}: {what}: {reason}") from error


def open_repository(location: str | os.PathLike[str]) -> Repository:
    """The repository in a folder, or at an address such as `gs://bucket/models`.

    Raises:
        RepositoryError: kind `invalid`, if it cannot be opened.

    >>> open_repository("models").location, open_repository("memory://models").location
    ('models', 'memory://models')
    """
    text = os.fsdecode(location)
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://"))
    return RemoteRepository(text) if "://" in text else Repository(text)


def _file_system(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(url)
    except ImportError as error:
        raise RepositoryError("invalid", f"{url}: needs pip install 'lepton-xla[remote]': {error}") from error
    except Exception as error:
        raise RepositoryError("invalid", f"{url}: cannot be opened: {first_line(error)}") from error
    return fs, path.rstrip("/")


def _default_cache() -> pathlib.Path:
    asked = os.environ.get("LEPTON_CACHE", "")
    if asked == "off":
        folder = tempfile.mkdtemp(prefix="lepton-models-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return pathlib.Path(folder)
    if asked:
        return pathlib.Path(asked) / "models"
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
    return root / "lepton_xla" / "models"


def _is_whole(folder: pathlib.Path, listing: Listing) -> bool:
    """Whether the files of a copy, which another process made, are what the manifest lists."""
    try:
        return all(_digest(folder, file) == entry.sha256 for file, entry in listing.files.items())
    except ArtifactError:
        return False


def _digest(folder: pathlib.Path, file: str) -> str:
    try:
        with open(folder / file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{folder}: {file} cannot be read: {error.strerror or error}") from error
