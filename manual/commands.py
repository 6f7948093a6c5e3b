"""Reference of the command line, from the commands themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from lepton_xla.cli import main
from manual.tables import code, plain, table


def page() -> str:
    """Every command with its arguments and options."""
    intro = (
        "# Command line\n\n"
        "Every command takes `--help`, and most take `--json`, which prints one JSON document on stdout. Progress and "
        "errors go to stderr. Exit codes: 0 done, 2 wrong use or something that you can change, with one line on "
        "stderr that says what; [faults](../faults.md#exit-codes) lists the others.\n\n"
    )
    return intro + "".join(_section(context) for context in contexts())


def contexts() -> Iterator[click.Context]:
    """A context for each command and subcommand."""
    yield from _below(click.Context(main, info_name="leptonx"))


def _below(context: click.Context) -> Iterator[click.Context]:
    group = context.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        yield inner
        if isinstance(command, click.Group):
            yield from _below(inner)


def _section(context: click.Context) -> str:
    command, path = context.command, context.command_path
    parts = [f"{'#' * (path.count(' ') + 1)} {path}\n\n"]
    parts.append(f"```text\n{' '.join([path, *command.collect_usage_pieces(context)])}\n```\n\n")
    parts.append(_help(command.help or "") + "\n")
    rows = [_row(parameter, context) for parameter in command.params if isinstance(parameter, click.Option)]
    if rows:
        parts.append(table(["option", "meaning"], rows) + "\n")
    return "".join(parts)


def _row(option: click.Option, context: click.Context) -> tuple[str, str]:
    names = ", ".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag or option.count else f" {option.make_metavar(context)}"
    extra = option.get_help_extra(context)
    notes = [extra.get("range", ""), "required" if option.required else ""]
    notes += [f"environment variable {code(each)}" for each in extra.get("envvars", ())]
    text = plain(option.help or "")
    if said := ", ".join(filter(None, notes)):
        text += f" ({said})"
    default = extra.get("default", "")
    if default:
        text += f" Default: {code(default)}."
    return code(names + value), text


def _help(text: str) -> str:
    """A command's help in Markdown: a paragraph after `\\b` keeps its lines."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if paragraph.lstrip().startswith("\b"):
            lines = [line for line in paragraph.splitlines() if line.strip() not in ("", "\b")]
            indent = min(len(line) - len(line.lstrip()) for line in lines)
            parts.append("```sh\n" + "\n".join(line[indent:] for line in lines) + "\n```\n")
        else:
            parts.append(plain(" ".join(paragraph.split())) + "\n")
    return "\n".join(parts)
