"""The command line run in this process, and an artifact that it made."""

import json
import pathlib
import shutil

import cli_models
import pytest
from click.testing import CliRunner, Result

from lepton_xla.cli import main


class Cli:
    """Runs `leptonx` and says what came of it."""

    def __call__(self, *args, input=None) -> Result:
        result = CliRunner().invoke(main, [str(arg) for arg in args], input=input, prog_name="leptonx")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def ok(self, *args, input=None) -> str:
        result = self(*args, input=input)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *args, input=None):
        return json.loads(self.ok(*args, "--json", input=input))

    def refused(self, *args, input=None) -> str:
        """The one line on stderr, progress left out, of a command that must end with 2 and print nothing."""
        result = self(*args, input=input)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        lines = [line for line in result.stderr.splitlines() if not line.startswith("... ")]
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("leptonx: ")
        return lines[0]


@pytest.fixture(scope="session")
def cli() -> Cli:
    return Cli()


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> pathlib.Path:
    """A folder with model files and recipes."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "plain_model.py").write_text(cli_models.PLAIN)
    (folder / "linen_model.py").write_text(cli_models.LINEN)
    (folder / "int8.toml").write_text(cli_models.INT8)
    (folder / "static.toml").write_text(cli_models.STATIC)
    return folder


@pytest.fixture(scope="session")
def plain(files) -> str:
    return f"{files / 'plain_model.py'}:model"


@pytest.fixture
def variant(tmp_path):
    """Makes a target from the plain model with fields of its ModelSpec changed: `variant("buckets={}")`."""
    count = iter(range(1000))

    def make(changes: str, before: str = "") -> str:
        file = tmp_path / f"variant{next(count)}.py"
        file.write_text(f"{cli_models.PLAIN}\n{before}\nmodel = make({changes})\n")
        return f"{file}:model"

    return make


@pytest.fixture(scope="session")
def compiled(cli, plain, files, tmp_path_factory):
    """The plain model as an int8 artifact: its folder, and the document that `compile` printed."""
    path = tmp_path_factory.mktemp("compiled") / "plain.lepton"
    return path, cli.json("compile", plain, "--recipe", files / "int8.toml", "-o", path)


@pytest.fixture(scope="session")
def artifact(compiled) -> pathlib.Path:
    return compiled[0]


@pytest.fixture
def damaged(artifact, tmp_path) -> pathlib.Path:
    """A copy to damage."""
    return shutil.copytree(artifact, tmp_path / "damaged.lepton")
