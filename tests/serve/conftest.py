import shutil

import pytest
from serve_fakes import Affine

from lepton_xla.serve import Options, Server


@pytest.fixture
def affine():
    return Affine()


@pytest.fixture
def server(affine):
    with Server(affine, Options(port=0, compress_bytes=1024)) as running:
        yield running
        affine.gate.set()


@pytest.fixture
def make_server():
    """Starts servers of any servable and options, and stops them at the end."""
    started = []

    def make(servable, **options):
        started.append((servable, Server(servable, Options(port=0, **options)).start()))
        return started[-1][1]

    yield make
    for servables, running in started:
        for servable in servables if isinstance(servables, list) else [servables]:
            if hasattr(servable, "gate"):
                servable.gate.set()
        running.stop()


@pytest.fixture
def browser():
    """A page of a headless Chromium. Neither it nor playwright is a package of the project."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as run:
        running = run.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = running.new_page(viewport={"width": 390, "height": 800})
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())
        yield page
        running.close()
