"""Commands in the README and the manual are commands of `leptonx` with options that it has."""

import re
import shlex

import click
import pytest
from blocks import ROOT, blocks

from lepton_xla.cli import main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text):
    """Every `leptonx ...` of a page: of blocks with a language, of those that are indented, and in its sentences.

    Gives (line, command).
    """
    found = [(block.line + number, line) for block in blocks(text) if block.language in ("sh", "console", "bash")
             for number, line in enumerate(_joined(block.code))]  # fmt: skip
    fenced = re.sub(r"^( *)```.*?^\1```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
    found += [(number + 1, line) for number, line in enumerate(_joined(fenced)) if line.startswith("    ")]
    found += [
        (fenced[: code.start()].count("\n") + 1, " ".join(code[1].split()))
        for code in re.finditer(r"`(leptonx\s[^`]+)`", fenced)
    ]
    return [(line, command.strip().removeprefix("$ ")) for line, command in found if _ours(command)]


def _joined(text):
    return re.sub(r"\s*\\\n\s*", " ", text).splitlines()


def _ours(line):
    return line.strip().removeprefix("$ ").startswith("leptonx ")


def check(command):
    """Raises ValueError where a command or an option is not there. Words after two blanks are a comment."""
    words = shlex.split(
        re.split(r"\s{2,}(?!-)|\s#|\s[|>&]", re.sub(r"^leptonx\s+(\w+)\s+", r"leptonx \1 ", command))[0]
    )
    context, group = click.Context(main, info_name="leptonx"), main
    rest = words[1:]
    while isinstance(group, click.Group) and rest and not rest[0].startswith("-"):
        found = group.get_command(context, rest[0])
        if found is None:
            raise ValueError(f"there is no command {rest[0]!r}: {command}")
        context, group, rest = click.Context(found, info_name=rest[0], parent=context), found, rest[1:]
    rest = rest[: rest.index("--")] if "--" in rest else rest
    known = {name for parameter in group.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("-") and word.partition("=")[0] not in known:
            raise ValueError(f"{' '.join(words[: -len(rest)])} has no option {word!r}: {command}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    wrong = []
    for line, command in commands(page.read_text(encoding="utf-8")):
        try:
            check(command)
        except ValueError as error:
            wrong.append(f"{page.name}:{line}: {error}")
    assert not wrong, "\n".join(wrong)


def test_a_command_or_an_option_that_is_not_there_is_seen():
    check("leptonx compile a.py:model --recipe int8 -o b.lepton    writes it")
    check("leptonx repo    push MODELS a.lepton --promote canary")
    check("leptonx launch local --processes 2 -- python train.py --anything")
    for wrong in (
        "leptonx compil a",
        "leptonx repo pull a",
        "leptonx serve a --prot 1",
        "leptonx repo push a b --prot=1",
    ):
        with pytest.raises(ValueError):
            check(wrong)


def test_commands_are_found():
    text = "a\n\n    leptonx plan a\n\n```sh\n$ leptonx serve b \\\n    --port 1\nls\n```\n\n```text\nleptonx no\n```\n"
    assert [command for _, command in commands(text)] == ["leptonx serve b --port 1", "leptonx plan a"]
