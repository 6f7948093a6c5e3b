import fcntl
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
READY = ROOT / "build" / "site.ready"
SOURCES = ("docs", "manual", "lepton_xla", "examples", "mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md")


def newest():
    """When something that the site is made of was last changed."""
    files = [
        path for name in SOURCES for path in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name])
    ]
    return max(path.stat().st_mtime for path in files if path.is_file() and path.suffix != ".pyc")


@pytest.fixture(scope="session")
def site():
    """The built site: that of `make docs`, which `make test` runs first; built here where that is old or missing."""
    READY.parent.mkdir(exist_ok=True)
    with (READY.parent / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other process of pytest waits, and finds it built
        if not READY.is_file() or READY.stat().st_mtime < newest():
            pytest.importorskip("mkdocs", reason="mkdocs is not installed")
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
            built = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, text=True,
                                   capture_output=True, timeout=280, check=False)  # fmt: skip
            assert built.returncode == 0, built.stdout + built.stderr
            READY.touch()
    return ROOT / "build" / "site"
