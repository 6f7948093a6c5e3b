"""Artifacts that are written while others read them, killed while they are, and paths of every kind."""

import dataclasses
import errno
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading

import msgspec
import numpy as np
import pytest

from lepton_xla import compiler
from lepton_xla.compiler import exchange, storage
from lepton_xla.compiler.storage import Store
from lepton_xla.errors import ArtifactError


def versions(artifact):
    return [
        dataclasses.replace(artifact, manifest=msgspec.structs.replace(artifact.manifest, version=version))
        for version in ("1", "2")
    ]


def test_at_no_moment_is_there_no_artifact(tmp_path, dense_artifact):
    """Looked at between any two steps of Python's while it is replaced."""
    one, two = versions(dense_artifact)
    one.save(tmp_path / "m.lepton")
    seen: set[str] = set()
    manifest = str(tmp_path / "m.lepton" / "manifest.json")
    lstat = os.stat

    def look(_frame, _event, _argument):
        try:
            lstat(manifest)
        except OSError:
            seen.add("nothing")
        else:
            seen.add("an artifact")

    sys.setprofile(look)
    try:
        two.save(tmp_path / "m.lepton", overwrite=True)
    finally:
        sys.setprofile(None)
    assert seen == {"an artifact"}
    assert compiler.verify(tmp_path / "m.lepton").manifest.version == "2"
    assert os.listdir(tmp_path) == ["m.lepton"]


@pytest.mark.parametrize("code", [None, errno.ENOSYS, errno.EINVAL])
def test_where_folders_cannot_be_exchanged_that_is_said(tmp_path, dense_artifact, monkeypatch, caplog, code):
    def call(*_):
        exchange.ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(exchange, "_renameat2", lambda: None if code is None else call)
    one, two = versions(dense_artifact)
    one.save(tmp_path / "m.lepton")
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        two.save(tmp_path / "m.lepton", overwrite=True)
    assert "this file system cannot exchange folders" in caplog.text
    assert compiler.verify(tmp_path / "m.lepton").manifest.version == "2"
    assert os.listdir(tmp_path) == ["m.lepton"]


def test_an_exchange_that_fails_keeps_the_old_one(tmp_path, dense_artifact, monkeypatch):
    def call(*_):
        exchange.ctypes.set_errno(errno.EIO)
        return -1

    one, two = versions(dense_artifact)
    one.save(tmp_path / "m.lepton")
    monkeypatch.setattr(exchange, "_renameat2", lambda: call)
    with pytest.raises(ArtifactError, match=r"m\.lepton: cannot be put in place: Input/output error$"):
        two.save(tmp_path / "m.lepton", overwrite=True)
    assert compiler.verify(tmp_path / "m.lepton").manifest.version == "1"
    assert os.listdir(tmp_path) == ["m.lepton"]


@pytest.mark.parametrize("read", [compiler.load, compiler.verify])
def test_what_is_replaced_while_it_is_read_is_read_again(tmp_path, dense_artifact, text_artifact, monkeypatch, read):
    dense_artifact.save(tmp_path / "m.lepton")
    real, count = Store.read, iter(range(1000))

    def replaced_after_the_manifest(store, name, *, limit):
        if next(count) == 1:
            text_artifact.save(tmp_path / "m.lepton", overwrite=True)
        return real(store, name, limit=limit)

    monkeypatch.setattr(Store, "read", replaced_after_the_manifest)
    assert read(tmp_path / "m.lepton").manifest.name == "text"


def test_each_save_is_another_folder_for_those_who_read(tmp_path, dense_artifact):
    """The system gives the number of a deleted folder to the next one."""
    stores = []
    for _ in range(4):
        dense_artifact.save(tmp_path / "m.lepton", overwrite=True)
        stores.append(Store(tmp_path / "m.lepton"))
    assert [store.is_replaced for store in stores] == [True, True, True, False]


def test_readers_beside_a_writer_always_find_one(tmp_path, dense_artifact, text_artifact):
    path = tmp_path / "m.lepton"
    one, two = dense_artifact, text_artifact
    one.save(path)
    done = threading.Event()
    found: list[str] = []

    def read():
        while not done.is_set():
            found.append(compiler.load(path).name)

    readers = [threading.Thread(target=read) for _ in range(2)]
    failures: list[BaseException] = []
    hook, threading.excepthook = threading.excepthook, lambda args: failures.append(args.exc_value)
    try:
        for reader in readers:
            reader.start()
        for number in range(16):
            (one, two)[number % 2].save(path, overwrite=True)
        done.set()
        for reader in readers:
            reader.join()
    finally:
        threading.excepthook = hook
    assert not failures
    assert set(found) == {"dense", "text"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_the_exchange_the_old_one_or_the_new_one_is_there(tmp_path, dense_artifact, when):
    one, two = versions(dense_artifact)
    one.save(tmp_path / "m.lepton")
    code = f"""
import os, signal, sys
from lepton_xla.compiler import storage
real = storage.exchange
def exchange(*paths):
    if {when!r} == "after":
        real(*paths)
    os.kill(os.getpid(), signal.SIGKILL)
storage.exchange = exchange
with storage.atomic_store(sys.argv[1], overwrite=True) as store:
    store.write("manifest.json", b"new")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path / "m.lepton"], check=False)
    assert done.returncode == -signal.SIGKILL
    if when == "before":
        assert compiler.verify(tmp_path / "m.lepton").manifest.version == "1"
    else:
        assert (tmp_path / "m.lepton" / "manifest.json").read_text() == "new"
    (left,) = [name for name in os.listdir(tmp_path) if name != "m.lepton"]
    os.utime(tmp_path / left, (0, 0))
    two.save(tmp_path / "m.lepton", overwrite=True)
    assert os.listdir(tmp_path) == ["m.lepton"]


@pytest.mark.parametrize(
    "name", ["back\\slash.lepton", "a\\b\\c", "per%20cent", "que?ry#x", "new\nline", "größe", "a b"]
)
def test_paths_that_files_may_have(tmp_path, dense_artifact, name):
    path = f"{tmp_path}/{name}"
    dense_artifact.save(path)
    dense_artifact.save(path, overwrite=True)
    assert os.listdir(tmp_path) == [name]
    assert compiler.verify(path).extra == ()
    assert compiler.load(pathlib.Path(path))(x=np.ones((1, 12), np.float32))["output"].shape == (1, 5)


@pytest.mark.parametrize("name", ["nu\0ll", "file:///tmp/nu%00ll", "lone\udc41\ud800"])
def test_paths_that_no_file_can_have(tmp_path, dense_artifact, name):
    path = name if "://" in name else f"{tmp_path}/{name}"
    uses = (compiler.load, compiler.verify, dense_artifact.save, lambda path: dense_artifact.save(path, overwrite=True))
    for use in uses:
        with pytest.raises(ArtifactError, match="is not a path: "):
            use(path)
    assert os.listdir(tmp_path) == []


def test_places_where_nothing_can_be_written(tmp_path, dense_artifact, monkeypatch):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "m.lepton", tmp_path / ("x" * 300)):
        with pytest.raises(
            ArtifactError, match=r"cannot be created: (File exists|Not a directory|File name too long)$"
        ):
            dense_artifact.save(path)
        with pytest.raises(ArtifactError, match=r"manifest\.json (is missing|cannot be read: File name too long)"):
            compiler.load(path)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/hidden")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"m\.lepton/?.*: .* cannot be written: No space left on device$"):
        dense_artifact.save(tmp_path / "m.lepton")
    assert os.listdir(tmp_path) == ["file"]


def test_code_is_not_written_back_into_another_artifact(copy_dense, text_artifact, monkeypatch, caplog):
    """The model that was loaded is no longer there: its code must not become that of the next."""
    path = copy_dense()
    here = compiler.Fingerprint.of()
    other = msgspec.structs.replace(here, jaxlib="0.0.1")
    monkeypatch.setattr(compiler.Fingerprint, "of", staticmethod(lambda device=None, count=1: other))
    from lepton_xla.compiler import loading

    real = loading._write_back

    def late(*args):
        text_artifact.save(path, overwrite=True)
        real(*args)

    monkeypatch.setattr(loading, "_write_back", late)
    with caplog.at_level(logging.WARNING):
        compiler.load(path, write_back=True)
    assert "not written back" in caplog.text
    assert list(compiler.verify(path).manifest.executables) == [here.digest]
