import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def site():
    """The built site: that of `make docs`, which `make test` runs first; built here only where there is none."""
    built = ROOT / "build" / "site"
    if not (ROOT / "build" / "site.ready").is_file():
        pytest.importorskip("mkdocs", reason="mkdocs is not installed")
        subprocess.run(["make", "docs"], cwd=ROOT, check=True, capture_output=True, timeout=280)
    return built
