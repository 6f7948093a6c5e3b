"""What holds for every command: help, one line for an error, exit code 2, clean stdout."""

import importlib
import json
import os
import re
import subprocess
import sys

import click
import pytest

import lepton_xla.cli
from lepton_xla.cli import COMMANDS, main


def run(*args, **kwargs):
    command = [sys.executable, "-m", "lepton_xla", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **kwargs)


def command(name):
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def test_help_lists_every_command(cli):
    text = cli.ok("--help")
    for name, summary in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", text, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_teaches_by_example_and_takes_json(cli, name):
    text = cli.ok(name, "--help")
    assert re.search(rf"^    (.* \| )?leptonx {name} ", text, re.MULTILINE)
    found = command(name)
    assert found.name == name
    for runs in found.commands.values() if isinstance(found, click.Group) else [found]:
        if (name, runs.name) == ("federate", "client"):  # it runs until it is ended, and prints nothing
            continue
        assert any("--json" in option.opts for option in runs.params)


def test_help_and_usage_errors_do_not_wait_for_jax():
    code = (
        "import sys; from click.testing import CliRunner; from lepton_xla.cli import main, COMMANDS\n"
        "for args in ([], ['--help'], ['nothing'], ['compile', '--help'], ['plan']):\n"
        "    CliRunner().invoke(main, args)\n"
        "assert 'lepton_xla.cli.plan' in sys.modules\n"
        "print(sorted({'jax', 'numpy', 'rich', 'tensorstore'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["--nothing"], "No such option '--nothing'"),
        (["plan"], "Missing argument 'TARGET' (see leptonx plan --help)"),
        (["plan", "x.py:m", "--nothing"], "--nothing"),
        (["bench", "x.lepton", "--rounds", "0"], "--rounds"),
        (["bench", "x.lepton", "--rounds", "many"], "many"),
        (["predict", "x.lepton"], "Missing option '--input'"),
        (["verify", "a", "b"], "unexpected extra argument"),
    ],
)
def test_a_usage_error_is_one_line(cli, args, part):
    assert part in cli.refused(*args)


@pytest.mark.parametrize("text", ["batch", "batch=", "=1", "batch=1,x", "batch=0", "batch=-1", "batch=1.5", "batch=²"])
def test_buckets_that_are_none(cli, plain, text):
    assert f"--buckets {text!r}: expected" in cli.refused("compile", plain, "--buckets", text)


def test_buckets_given_twice(cli, plain):
    line = cli.refused("compile", plain, "--buckets", "batch=1", "--buckets", "batch=2")
    assert "--buckets names 'batch' twice" in line


def test_a_bug_is_not_taken_for_the_users_mistake(cli, monkeypatch):
    def broken(name):
        raise RuntimeError("a bug")

    monkeypatch.setattr("lepton_xla.recipe.preset_text", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("recipes", "int8")


def test_commands_are_found_by_their_names():
    for name in COMMANDS:
        assert isinstance(getattr(importlib.import_module(f"lepton_xla.cli.{name}"), name), click.Command)
    assert lepton_xla.cli.main.get_command(click.Context(main), "_common") is None


def test_a_process_prints_json_alone_on_stdout_and_ends_with_0(files):
    done = run("plan", f"{files / 'linen_model.py'}:model", "--recipe", "int8", "--json")
    assert done.returncode == 0
    assert [site["site"] for site in json.loads(done.stdout)["sites"]] == [
        "params/Conv_0/kernel",
        "params/Dense_0/kernel",
    ]
    assert "a model file may print" in done.stderr


def test_a_process_ends_with_2_and_no_traceback(tmp_path):
    done = run("verify", tmp_path / "nothing.lepton")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("... ")]
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1)
    assert "nothing.lepton: manifest.json is missing: there is no such folder" in lines[0]


def unread():
    """A pipe whose reader has gone, as with `| head -0`."""
    read, write = os.pipe()
    os.close(read)
    return write


def full():
    return os.open("/dev/full", os.O_WRONLY)


FULL = (2, ["leptonx: stdout cannot be written: No space left on device"])
UNREAD = (141, [])  # 128 + SIGPIPE, as of any program that `head` ends


@pytest.mark.parametrize(
    ("args", "stdout", "expected"),
    [
        (["inspect", "ARTIFACT"], unread, UNREAD),
        (["inspect", "ARTIFACT", "--json"], full, FULL),
        (["inspect", "--help"], unread, UNREAD),
        (["--version"], full, FULL),
    ],
)
def test_what_cannot_be_printed_is_one_line_and_exit_code_2_and_a_reader_that_has_gone_is_no_error(
    artifact, args, stdout, expected
):
    """Whatever the command: the rest of them is checked where they print."""
    args = [str(artifact) if arg == "ARTIFACT" else arg for arg in args]
    number = stdout()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lepton_xla", *args], stdout=number, stderr=subprocess.PIPE, text=True, check=False
        )  # fmt: skip
    finally:
        os.close(number)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("... ")]
    assert (done.returncode, lines) == expected


def test_a_closed_stdout_is_one_line_and_exit_code_2(monkeypatch, capsys):
    """As with `>&-`, where Python has no stdout at all."""
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as ended:
        main(["recipes"], prog_name="leptonx")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("leptonx: stdout is closed")


def test_an_error_of_another_file_is_not_taken_for_one_of_stdout(cli, monkeypatch):
    def broken(name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lepton_xla.recipe.preset_text", broken)
    with pytest.raises(OSError, match="No space left"):
        cli("recipes", "int8")
