"""Compiled artifacts that several tests read, made once."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable

import compiler_models as models
import pytest

from lepton_xla import compiler


@pytest.fixture(scope="session")
def dense_artifact() -> compiler.Artifact:
    return compiler.compile(models.dense(), {"batch": (1, 4, 8)}, name="dense", recipe={"name": "none"})


@pytest.fixture(scope="session")
def text_artifact() -> compiler.Artifact:
    return compiler.compile(models.text(), {"batch": (1, 4), "seq": (4, 16)}, name="text")


@pytest.fixture(scope="session")
def saved_dense(tmp_path_factory: pytest.TempPathFactory, dense_artifact: compiler.Artifact) -> pathlib.Path:
    path = tmp_path_factory.mktemp("saved") / "dense.lepton"
    dense_artifact.save(path)
    return path


@pytest.fixture
def copy_dense(tmp_path: pathlib.Path, saved_dense: pathlib.Path) -> Callable[[], pathlib.Path]:
    """Makes a fresh copy that a test may damage."""
    count = iter(range(10_000))

    def copy() -> pathlib.Path:
        return shutil.copytree(saved_dense, tmp_path / f"copy{next(count)}.lepton")

    return copy
