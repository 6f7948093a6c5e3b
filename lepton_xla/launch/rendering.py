"""Fills in the templates of files that start a run elsewhere, and checks what is filled in."""

from __future__ import annotations

import importlib.resources
import pathlib
import re
import shlex
import string
from collections.abc import Sequence

from lepton_xla.errors import LaunchError

MARGIN_S = 10
"""So much sooner than the scheduler, the launcher kills what has not stopped, and reports it."""


class _Template(string.Template):
    """With `@{name}`: `$` and `#` have a meaning in the files themselves."""

    delimiter = "@"


def render(template: str, /, **values: object) -> str:
    """A file of `templates/` with its blanks filled in. A line whose blanks are all empty is left out.

    >>> "#SBATCH --nodes=2" in render("slurm.sh", **{name: "" for name in blanks("slurm.sh")} | {"nodes": "2"})
    True
    """
    lines: list[str] = []
    for line in _text(template).splitlines():
        names = _Template(line).get_identifiers()
        if not names or any(str(values[name]) for name in names):
            lines.append(_Template(line).substitute(values))
    return "\n".join(lines) + "\n"


def blanks(template: str) -> list[str]:
    """Names of the blanks of a template."""
    return _Template(_text(template)).get_identifiers()


def _text(template: str) -> str:
    return importlib.resources.files("lepton_xla.launch").joinpath("templates", template).read_text(encoding="utf-8")


def block(lines: Sequence[str], indent: str = "") -> str:
    """Lines for one blank: the first is indented by the template itself."""
    return f"\n{indent}".join(lines)


def one_line(name: str, value: str) -> str:
    """The value, if it is one line without control characters.

    Raises:
        LaunchError: otherwise; it would end the line of the file that it is written into.
    """
    if not value.isprintable():
        raise LaunchError(f"{name} {value!r}: expected one line of printable characters")
    return value


def label(name: str, value: str, longest: int = 40) -> str:
    """The value, if it can name things in Kubernetes and in clouds.

    Raises:
        LaunchError: otherwise.

    >>> label("--name", "digits-1")
    'digits-1'
    """
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", value) or len(value) > longest:
        raise LaunchError(
            f"{name} {value!r}: expected at most {longest} lower-case letters, digits and dashes, a letter first"
        )
    return value


def supervised(command: Sequence[str], *, watch: Sequence[str], grace_s: float) -> list[str]:
    """The command of one process under `leptonx launch local`, which watches it and passes signals on.

    Raises:
        LaunchError: if the command is empty or has control characters.
    """
    if not command:
        raise LaunchError("give the command to start, such as `-- python train.py`")
    for word in command:
        one_line("the command", word)
    return ["leptonx", "launch", "local", "--grace-s", f"{grace_s:g}", *watch, "--", *command]


def shell(command: Sequence[str]) -> str:
    """A command as a shell reads it."""
    return shlex.join(command)


def write(text: str, output: str) -> None:
    """Write a file, executable if it is a script.

    Raises:
        LaunchError: if it cannot be written.
    """
    path = pathlib.Path(output)
    try:
        path.write_text(text, encoding="utf-8")
        if text.startswith("#!"):
            path.chmod(path.stat().st_mode | 0o111)
    except OSError as error:
        raise LaunchError(f"{output} cannot be written: {error.strerror}") from error
