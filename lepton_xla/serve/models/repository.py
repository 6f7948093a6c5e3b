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
from collections.abc import Callable, Generator
from typing import Any

import msgspec

from lepton_xla.errors import ArtifactError, RepositoryError
from lepton_xla.files.copies import copy_artifact, listing_of, read_text, write_whole
from lepton_xla.files.folders import flush, flush_tree, held, remove_abandoned
from lepton_xla.files.listing import MANIFEST, Listing
from lepton_xla.serve.models.bases import base_of, refuse_needed
from lepton_xla.serve.models.descriptions import described
from lepton_xla.serve.models.found import Found, Stamp
from lepton_xla.serve.models.labels import HISTORY, Track, read_history, with_label
from lepton_xla.serve.models.plans import PLAN, read_plan, refuse_in_use, write_plan
from lepton_xla.serve.models.settings import (
    SETTINGS,
    ModelSettings,
    check_label,
    check_version,
    is_version,
    parse_settings,
)
from lepton_xla.serve.protocol.signature import is_safe
from lepton_xla.serve.protocol.traffic import Plan

SUFFIX = ".lepton"
_ABANDONED = re.compile(r"\.[0-9a-f]{16}\.(tmp|old)")
_LEFT_FILE = re.compile(r"\.[0-9a-f]{16}\.part")


class Repository:
    """Models in a folder.

    Args:
        root: the folder; `push` makes it.

    Attributes:
        root: the folder; of a repository elsewhere, that of its copy.
        location: where it is, for people.

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
        self.location = os.fspath(root)

    def scan(self) -> dict[str, Found]:
        """Look at all models, by name.

        A model that cannot be read has a `problem`, and hides no other. Nothing half-written is found.

        Raises:
            RepositoryError: kind `failed`, if the folder itself cannot be read.
        """
        looked = {name: self._look(name) for name in self._model_names()}
        return {name: found for name, found in looked.items() if found is not None}

    def describe(self) -> list[dict[str, Any]]:
        """All models as plain JSON, for people: versions with sizes and labels, and what is wrong.

        Raises:
            RepositoryError: as `scan`.
        """
        looked = [self._look(name) for name in self._model_names()]
        return [described(found, self._read_listing) for found in looked if found is not None]

    def find(self, name: str) -> Found:
        """Look at one model.

        Raises:
            RepositoryError: kind `missing` if there is none of that name, `invalid` if none can have it.
        """
        return self._existing(name)

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
        return found.versions[base_of(listing, self._listings(found), f"version {version} of model {name!r}")]

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
            base_of(listing, self._listings(self._look(name) or Found(name)), f"what is pushed to model {name!r}")

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
        with self._locked(name):
            found = self._existing(name)
            if version not in found.versions:
                there = ", ".join(found.versions) or "none"
                raise RepositoryError("missing", f"model {name!r} has no version {version}; there: {there}")
            stands = self._settings(name).labels.get(label)
            if stands != version:
                self._move(name, label, self._track(name, label, stands).moved(version))
            return stands

    def rollback(self, name: str, label: str = "stable", version: str | None = None) -> tuple[str, str]:
        """Move a label back to the version that it stood on before; versions that were removed are passed over.

        Args:
            name: the model's.
            label: the label.
            version: where it must stand now, for whoever has looked before; None for wherever it stands.

        Returns:
            The version that it stood on, and the one that it stands on now.

        Raises:
            RepositoryError: `missing` if there is no such model or label, or nothing before; `conflict` if it stands
                elsewhere.
        """
        check_label(label)
        with self._locked(name):
            found = self._existing(name)
            stands = self._settings(name).labels.get(label)
            if stands is None:
                raise RepositoryError("missing", f"model {name!r} has no label {label!r}")
            if version not in (None, stands):
                raise RepositoryError("conflict", f"label {label!r} of model {name!r} stands on version {stands} now")
            before = self._track(name, label, stands).before
            while before and (before[-1] not in found.versions or before[-1] == stands):
                before = before[:-1]
            if not before:
                raise RepositoryError("missing", f"label {label!r} of model {name!r} stood on no other version before")
            self._move(name, label, Track(before[-1], before[:-1]))
            return stands, before[-1]

    def remove(self, name: str, version: str) -> None:
        """Remove a version: it is gone at once, and its files soon after.

        Raises:
            RepositoryError: `missing` if it is not there, `conflict` if a label stands on it, or another version that
                has weights only runs on its code.
        """
        check_version(version)
        with self._locked(name):
            found = self._existing(name)
            if version not in found.versions:
                raise RepositoryError("missing", f"model {name!r} has no version {version}")
            labels = [label for label, stands in self._settings(name).labels.items() if stands == version]
            if labels:
                what = " and ".join(map(repr, labels))
                raise RepositoryError(
                    "conflict", f"version {version} of model {name!r} is what {what} stands on: promote another first"
                )
            refuse_in_use(found.plan, found, version)
            refuse_needed(name, version, self._listings(found))
            self._delete(name, version)

    def replan(self, name: str, change: Callable[[Plan, Found], Plan]) -> Plan:
        """Change how the requests for a model are shared, see `plans.py`; nobody else changes it meanwhile.

        Args:
            name: the model's.
            change: gives the next plan; what it raises leaves all as it was.

        Raises:
            RepositoryError: `missing` if there is no such model, `invalid` if its files cannot be read, or `failed`.
        """
        with self._locked(name):
            found = self._existing(name)
            if found.problem:
                raise RepositoryError("invalid", found.problem)
            plan = change(found.plan, found)
            if plan != found.plan:
                self._write(name, PLAN, write_plan(plan))
            return plan

    def note(self, name: str, file: str, data: bytes) -> None:
        """Write a small file beside a model's versions, whole; whoever looks for versions passes it over.

        Raises:
            RepositoryError: kind `failed`.
        """
        with self._locked(name):  # whose holder may remove what killed writers left
            self._write(name, file, data)

    def _existing(self, name: str) -> Found:
        check_model_name(name)
        found = self._look(name)
        if found is None:
            raise RepositoryError("missing", f"{self.location}: there is no model {name!r}")
        return found

    def _model_names(self) -> list[str]:
        try:
            entries = list(os.scandir(self.root))
        except OSError as error:
            raise _failed(f"{self.root}: cannot be read", error) from error
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))

    def _delete(self, name: str, version: str) -> None:
        folder = self.root / name
        aside = folder / f".{secrets.token_hex(8)}.old"
        (folder / f"{version}{SUFFIX}").rename(aside)
        flush(folder)
        aside.unlink() if aside.is_symlink() else shutil.rmtree(aside, ignore_errors=True)

    def _listings(self, found: Found) -> dict[str, Listing | None]:
        """By version, what each lists; None if its manifest cannot be read."""
        return {version: self._listing(found, version) for version in found.versions}

    def _listing(self, found: Found, version: str) -> Listing | None:
        try:
            return self._read_listing(found, version)
        except ArtifactError:
            return None

    def _read_listing(self, found: Found, version: str) -> Listing:
        return listing_of(found.versions[version])[0]

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
        settings, plan, problem = ModelSettings(), Plan(), None
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
            settings = self._settings(name)
            plan = read_plan(self._read(name, PLAN)) if PLAN in names else plan
        except (FileNotFoundError, NotADirectoryError):  # there is no such folder, or no longer
            return None
        except OSError as error:
            problem = f"{folder}: cannot be read: {error.strerror or error}"
        except RepositoryError as error:
            problem = str(error)
        if not (versions or ignored or problem or SETTINGS in names):
            return None
        ascending = {version: versions[version] for version in sorted(versions, key=int)}
        return Found(name, ascending, settings, problem, stamps, tuple(ignored), plan)

    def _read(self, name: str, file: str) -> str | None:
        """A small file in the folder of a model; None if there is none."""
        return read_text(self.root / name / file)

    def _write(self, name: str, file: str, data: bytes) -> None:
        write_whole(self.root / name / file, data)

    def _settings(self, name: str) -> ModelSettings:
        text = self._read(name, SETTINGS)
        return ModelSettings() if text is None else parse_settings(text)

    def _track(self, name: str, label: str, stands: str | None) -> Track:
        """What is known of a label that stands there."""
        known = read_history((self._read(name, HISTORY) or "").encode()).get(label, Track())
        return known.caught_up(stands)

    def _move(self, name: str, label: str, track: Track) -> None:
        """Write where a label stands, then its history; `labels.py` says what a kill between the two does."""
        assert track.stands is not None
        self._write(name, SETTINGS, with_label(self._read(name, SETTINGS) or "", label, track.stands).encode())
        history = read_history((self._read(name, HISTORY) or "").encode())
        self._write(name, HISTORY, msgspec.json.encode({**history, label: track}))

    @contextlib.contextmanager
    def _locked(self, name: str) -> Generator[None, None, None]:
        """Keep everybody else from changing a model's labels."""
        check_model_name(name)
        folder = self.root / name
        try:
            with held(folder, wait=True):
                for entry in os.listdir(folder) if folder.is_dir() else ():
                    if _LEFT_FILE.fullmatch(entry):  # of a process that was killed: only the holder of the lock writes
                        (folder / entry).unlink()
                yield
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
