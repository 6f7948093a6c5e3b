"""The Java client against a running server, compiled here. Skipped where there is no JDK."""

import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from serve_fakes import Affine
from test_generation import Ascii, Letters

from lepton_xla.program import TensorSpec

SOURCES = sorted((pathlib.Path(__file__).parents[2] / "clients" / "java").glob("*.java"))
pytestmark = pytest.mark.skipif(not (shutil.which("javac") and shutil.which("java")), reason="there is no JDK")


class Doubled(Affine):
    """y = 2 x."""

    name = "doubled"

    def __init__(self):
        super().__init__()
        self.inputs = {"x": TensorSpec(("batch", 4), "float32")}
        self.outputs = {"y": TensorSpec(("batch", 4), "float32")}

    def run(self, sizes, arrays):
        return [2 * np.asarray(arrays[0])]


@pytest.fixture(scope="module")
def java(tmp_path_factory):
    """`java(server, *arguments)` runs the example."""
    classes = tmp_path_factory.mktemp("classes")
    compile_ = ["javac", "-J-XX:TieredStopAtLevel=1", "-Xlint:all", "-Werror", "--release", "11", "-d", str(classes)]
    subprocess.run([*compile_, *map(str, SOURCES)], check=True, timeout=120)

    def run(server, *arguments):
        url = "http://{}:{}".format(*server.address[:2])
        command = ["java", "-XX:TieredStopAtLevel=1", "-cp", str(classes), "Example", url, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return run


def test_tensors_in_binary(java, make_server):
    server = make_server(Doubled())
    done = java(server, "doubled", "x", "1,2,-0.5,3e3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "y[1, 4] = [2.0, 4.0, -1.0, 6000.0]\n"
    refused = java(server, "doubled", "x", "1,2,3,4,5")
    assert (refused.returncode, refused.stderr.count("HTTP 400: ")) == (1, 1)


def test_text_as_it_comes(java, make_server):
    server = make_server(Letters(Ascii()))
    done = java(server, "letters", 'a "quoted" \\ text')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*"uvwxyz{|", "ended by length"]
    assert "HTTP 404" in java(server, "nobody", "a").stderr
    assert "HTTP 400: the prompt is empty" in java(server, "letters", "").stderr
