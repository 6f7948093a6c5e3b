"""A repository of models in a folder: `MODELS/NAME/VERSION.lepton`, with a `model.toml` beside the versions.

A version appears whole: it is copied beside under a name that `scan` ignores, flushed, and renamed. It needs no lock: a
rename onto a version that exists fails. Labels move under a lock on the model's folder.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Generator

import msgspec

from lepton_xla.copies import copy_artifact, listing_of, read_text, write_whole
from lepton_xla.errors import RepositoryError
from lepton_xla.folders import flush, flush_tree, held, remove_abandoned
from lepton_xla.listing import MANIFEST, Listing
from lepton_xla.serve.models.bases import base_of, refuse_needed
from lepton_xla.serve.models.found import Found, Stamp
from lepton_xla.serve.models.labels import HISTORY, Track, read_history, with_label
from lepton_xla.serve.models.settings import (
    SETTINGS,
    ModelSettings,
    check_label,
    check_version,
    is_version,
    parse_settings,
)
from lepton_xla.serve.protocol.signature import is_safe

SUFFIX = ".lepton"
_ABANDONED = re.compile(r"\.[0-9a-f]{16}\.(tmp|old)")
_LEFT_FILE = re.compile(r"\.[0-9a-f]{16}\.part")


class Repository:
    """Models in a folder.

    Args:
        root: the folder; `push` makes it.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> _ = lx.compile(program, {"batch": (1,)}).save("tiny.lepton")
    >>> repository = Repository("models")
    >>> repository.push("tiny.lepton", "tiny"), repository.push("tiny.lepton", "tiny")
    ('1', '2')
    >>> repository.promote("tiny", "1"), repository.promote("tiny", "2"), repository.rollback("tiny")
    (None, '1', ('2', '1'))
    >>> found = repository.scan()["tiny"]
    >>> list(found.versions), found.settings.labels
    (['1', '2'], {'stable': '1'})
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = pathlib.Path(root)

    def scan(self) -> dict[str, Found]:
        """Look at all models, by name.

        A model that cannot be read has a `problem`, and hides no other. Nothing half-written is found.

        Raises:
            RepositoryError: kind `failed`, if the folder itself cannot be read.
        """
        try:
            entries = sorted(os.scandir(self.root), key=lambda entry: entry.name)
        except OSError as error:
            raise _failed(f"{self.root}: cannot be read", error) from error
        found: dict[str, Found] = {}
        for entry in entries:
            if entry.name.startswith(".") or not _is_folder(entry):
                continue
            model = self._look(entry.name)
            if model is not None:
                found[entry.name] = model
        return found

    def find(self, name: str) -> Found:
        """Look at one model.

        Raises:
            RepositoryError: kind `missing` if there is none of that name, `invalid` if none can have it.
        """
        check_model_name(name)
        found = self._look(name) if (self.root / name).is_dir() else None
        if found is None:
            raise RepositoryError("missing", f"{self.root}: there is no model {name!r}")
        return found

    def push(self, artifact: str | os.PathLike[str], name: str, version: str | None = None) -> str:
        """Copy an artifact into the repository, checking each file against its digest.

        Two pushes at once both land, or one of them is refused because it asked for the version of the other.

        Args:
            artifact: a local artifact.
            name: the model's name in the repository.
            version: a version that is not there; by default one more than the greatest.

        Returns:
            The version.

        Raises:
            RepositoryError: `invalid` for a name or a version that is not allowed, `conflict` if the version is there,
                `missing` if it has weights only and no version has the compiled code that they fit, `failed` if the
                copy could not be written. Nothing is left behind.
            ArtifactError: if the artifact is missing or damaged.
        """
        with self.stage(name, version) as staged:
            copy_artifact(pathlib.Path(artifact), staged)
            return self.commit(staged, name, version)

    def find_base(self, name: str, version: str) -> pathlib.Path | None:
        """The artifact of the same model on whose compiled code a version runs.

        Returns:
            None for a version that has code of its own; else the greatest version with the same `fit` that has.

        Raises:
            RepositoryError: `missing` if there is no such version, or none that its weights fit.
            ArtifactError: if the version's manifest cannot be read.
        """
        found = self.find(name)
        if version not in found.versions:
            raise RepositoryError("missing", f"model {name!r} has no version {version}")
        listing = listing_of(found.versions[version])[0]
        if not listing.is_update:
            return None
        return found.versions[base_of(listing, found, f"version {version} of model {name!r}")]

    @contextlib.contextmanager
    def stage(self, name: str, version: str | None = None) -> Generator[pathlib.Path, None, None]:
        """An empty folder inside the repository that `scan` ignores, to be filled and committed; removed otherwise.

        Raises:
            RepositoryError: as `push`.
        """
        check_model_name(name)
        if version is not None:
            check_version(version)
        folder = self.root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned(folder, _ABANDONED)
            self._refuse_taken(folder, version)
            staged = folder / f".{secrets.token_hex(8)}.tmp"
            staged.mkdir()
        except OSError as error:
            raise _failed(f"{folder}: cannot be written", error) from error
        try:
            with held(staged):
                yield staged
        except OSError as error:
            raise _failed(f"{folder}: cannot be written", error) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # after a commit there is nothing of that name

    def commit(self, staged: pathlib.Path, name: str, version: str | None = None) -> str:
        """Rename a staged folder to a version; by default one more than the greatest.

        Raises:
            RepositoryError: `conflict` if the version is there, `missing` if it has weights only and no version has
                the code that they fit.
        """
        listing = listing_of(staged)[0]
        if not listing.is_update:
            return self._put(staged, name, version)
        with self._locked(name):  # so that the version that it runs on stays
            self.check_base(listing, name)
            return self._put(staged, name, version)

    def check_base(self, listing: Listing, name: str) -> None:
        """Check that what has weights only has a version whose code it can run on.

        Raises:
            RepositoryError: kind `missing`, if there is none.
        """
        if listing.is_update:
            base_of(listing, self._look(name) or Found(name), f"what is pushed to model {name!r}")

    def _put(self, staged: pathlib.Path, name: str, version: str | None) -> str:
        folder = self.root / name
        flush_tree(staged)
        while True:
            target = version or str(max(map(int, _taken(folder)), default=0) + 1)
            self._refuse_taken(folder, version)
            try:
                staged.rename(folder / f"{target}{SUFFIX}")
            except OSError:
                # Another push was faster, or a file is in the way.
                if f"{target}{SUFFIX}" in os.listdir(folder):
                    continue
                raise
            flush(folder)
            return target

    def promote(self, name: str, version: str, label: str = "stable") -> str | None:
        """Move a label to a version.

        Returns:
            The version that the label stood on before; None if it is new.

        Raises:
            RepositoryError: `missing` if there is no such model or version, `conflict` if `model.toml` cannot be
                changed, `invalid` or `failed` as others.
        """
        check_label(label)
        check_version(version)
        with self._locked(name) as folder:
            found = self.find(name)
            if version not in found.versions:
                there = ", ".join(found.versions) or "none"
                raise RepositoryError("missing", f"model {name!r} has no version {version}; there: {there}")
            stands = self._settings(folder).labels.get(label)
            self._move(folder, label, self._track(folder, label, stands).moved(version), moves=stands != version)
            return stands

    def rollback(self, name: str, label: str = "stable") -> tuple[str, str]:
        """Move a label back to the version that it stood on before; versions that were removed are passed over.

        Returns:
            The version that it stood on, and the one that it stands on now.

        Raises:
            RepositoryError: `missing` if there is no such model or label, or nothing before.
        """
        check_label(label)
        with self._locked(name) as folder:
            found = self.find(name)
            stands = self._settings(folder).labels.get(label)
            if stands is None:
                raise RepositoryError("missing", f"model {name!r} has no label {label!r}")
            before = self._track(folder, label, stands).before
            while before and (before[-1] not in found.versions or before[-1] == stands):
                before = before[:-1]
            if not before:
                raise RepositoryError("missing", f"label {label!r} of model {name!r} stood on no other version before")
            self._move(folder, label, Track(before[-1], before[:-1]), moves=True)
            return stands, before[-1]

    def remove(self, name: str, version: str) -> None:
        """Remove a version: it is gone at once, and its files soon after.

        Raises:
            RepositoryError: `missing` if it is not there, `conflict` if a label stands on it, or another version that
                has weights only runs on its code.
        """
        check_version(version)
        with self._locked(name) as folder:
            found = self.find(name)
            if version not in found.versions:
                raise RepositoryError("missing", f"model {name!r} has no version {version}")
            labels = [label for label, stands in self._settings(folder).labels.items() if stands == version]
            if labels:
                what = " and ".join(map(repr, labels))
                raise RepositoryError(
                    "conflict", f"version {version} of model {name!r} is what {what} stands on: promote another first"
                )
            refuse_needed(found, version)
            aside = folder / f".{secrets.token_hex(8)}.old"
            (folder / f"{version}{SUFFIX}").rename(aside)
            flush(folder)
            aside.unlink() if aside.is_symlink() else shutil.rmtree(aside, ignore_errors=True)

    def _look(self, name: str) -> Found | None:
        """What is there of a model; None if its folder holds nothing of one."""
        try:
            check_model_name(name)
        except RepositoryError as error:
            return Found(name, problem=str(error))
        folder = self.root / name
        versions: dict[str, pathlib.Path] = {}
        stamps: dict[str, Stamp] = {}
        ignored: list[str] = []
        settings, problem = ModelSettings(), None
        names: list[str] = []
        try:
            names = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
            for entry in names:
                if not entry.endswith(SUFFIX):
                    continue
                version = entry.removesuffix(SUFFIX)
                stamp = _stamp(folder / entry / MANIFEST)
                if not is_version(version) or stamp is None:
                    ignored.append(entry)
                    continue
                versions[version], stamps[version] = folder / entry, stamp
            settings = self._settings(folder)
        except OSError as error:
            problem = f"{folder}: cannot be read: {error.strerror or error}"
        except RepositoryError as error:
            problem = str(error)
        if not (versions or ignored or problem or SETTINGS in names):
            return None
        ascending = {version: versions[version] for version in sorted(versions, key=int)}
        return Found(name, ascending, settings, problem, stamps, tuple(ignored))

    def _settings(self, folder: pathlib.Path) -> ModelSettings:
        text = read_text(folder / SETTINGS)
        return ModelSettings() if text is None else parse_settings(text)

    def _track(self, folder: pathlib.Path, label: str, stands: str | None) -> Track:
        """What is known of a label that stands there."""
        known = read_history((read_text(folder / HISTORY) or "").encode()).get(label, Track())
        return known.caught_up(stands)

    def _move(self, folder: pathlib.Path, label: str, track: Track, *, moves: bool) -> None:
        """Write where a label stands, then its history; see the module for what a kill between the two does."""
        if not moves:
            return
        assert track.stands is not None
        write_whole(folder / SETTINGS, with_label(read_text(folder / SETTINGS) or "", label, track.stands).encode())
        history = read_history((read_text(folder / HISTORY) or "").encode())
        write_whole(folder / HISTORY, msgspec.json.encode({**history, label: track}))

    @contextlib.contextmanager
    def _locked(self, name: str) -> Generator[pathlib.Path, None, None]:
        """The folder of a model, while nobody else changes its labels."""
        check_model_name(name)
        folder = self.root / name
        try:
            with held(folder, wait=True):
                for entry in os.listdir(folder) if folder.is_dir() else ():
                    if _LEFT_FILE.fullmatch(entry):  # of a process that was killed: only the holder of the lock writes
                        (folder / entry).unlink()
                yield folder
        except OSError as error:
            raise _failed(f"{folder}: cannot be changed", error) from error

    def _refuse_taken(self, folder: pathlib.Path, version: str | None) -> None:
        if version is not None and os.path.lexists(folder / f"{version}{SUFFIX}"):
            raise RepositoryError(
                "conflict", f"model {folder.name!r} has a version {version}; push another, or leave the version out"
            )


def check_model_name(name: str) -> str:
    """Return a name if a model in a repository may have it.

    Raises:
        RepositoryError: kind `invalid`.

    >>> check_model_name("../secret")
    Traceback (most recent call last):
    lepton_xla.errors.RepositoryError: model name '../secret': no slashes, controls, blanks at the ends or dot first...
    """
    if not is_safe(name) or len(name) > 128 or name.startswith(".") or name == "stats":
        raise RepositoryError(
            "invalid",
            f"model name {name[:140]!r}: no slashes, controls, blanks at the ends or dot first, 1 to 128 characters, "
            "and not 'stats'",
        )
    return name


def _taken(folder: pathlib.Path) -> list[str]:
    """Versions whose names are taken, whatever is there."""
    versions = (entry.removesuffix(SUFFIX) for entry in os.listdir(folder) if entry.endswith(SUFFIX))
    return [version for version in versions if is_version(version)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _stamp(file: pathlib.Path) -> Stamp | None:
    """The stamp of a regular file; None if there is none."""
    try:
        found = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _failed(what: str, error: OSError) -> RepositoryError:
    return RepositoryError("failed", f"{what}: {error.strerror or error}")
