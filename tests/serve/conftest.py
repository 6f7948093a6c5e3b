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
