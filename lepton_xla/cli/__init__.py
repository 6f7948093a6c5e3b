"""`leptonx`: one click command a file, all registered here."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from lepton_xla.cli._stdout import stdout_checked
from lepton_xla.errors import LeptonError

# What `leptonx --help` lists, in the order in which one uses it. A command's file is imported when the command is run,
# so that help does not wait for the rest.
COMMANDS = {
    "recipes": "List the recipes that come with leptonx.",
    "plan": "Show what a recipe would do to each site of a model.",
    "sensitivity": "Rank the weights of a model by what quantizing them costs.",
    "compile": "Optimize a model and compile it into an artifact.",
    "inspect": "Show what is in an artifact.",
    "verify": "Check every file of an artifact against its digest.",
    "eval": "Compare an artifact's accuracy with the float model's.",
    "bench": "Measure an artifact, and the float model beside it.",
    "predict": "Run an artifact on inputs from files.",
    "serve": "Answer HTTP requests with an artifact.",
    "load": "Put load on a server and measure how long its answers take.",
    "token": "Make, list and revoke the tokens that a server asks for.",
}


class OneLineError(click.ClickException):
    """What the user can put right: one line on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"leptonx: {' '.join(self.message.split())}", file=file, err=file is None)


def _one_line(error: click.ClickException) -> click.ClickException:
    """The same error on one line, with where to read on."""
    if isinstance(error, OneLineError | click.exceptions.NoArgsIsHelpError):
        return error
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return OneLineError(error.format_message().rstrip(".") + hint)


class LeptonGroup(click.Group):
    """A group that imports a command when it is run, and tells an error in one line on stderr with exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found = getattr(importlib.import_module(f"lepton_xla.cli.{cmd_name}"), cmd_name)
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        for arg in args:
            if "\0" in arg:  # from Python only: no shell hands one over
                raise OneLineError(f"the argument {arg!r} has a null byte in it")
        try:
            with stdout_checked():  # --help and --version print here
                return super().make_context(info_name, args, parent, **extra)
        except LeptonError as error:
            raise OneLineError(str(error)) from error
        except click.ClickException as error:
            raise _one_line(error) from error

    def invoke(self, ctx: click.Context) -> object:
        try:
            with stdout_checked():
                return super().invoke(ctx)
        except LeptonError as error:
            raise OneLineError(str(error)) from error
        except click.ClickException as error:
            raise _one_line(error) from error
        except RuntimeError as error:
            if not _is_of_xla(error):
                raise
            raise OneLineError(f"XLA failed: {(str(error).strip().splitlines() or ['no message'])[0]}") from error


def _is_of_xla(error: RuntimeError) -> bool:
    """Whether XLA raised it, where code is compiled or run; JAX is not imported to ask."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError)


@click.group(cls=LeptonGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lepton-xla", prog_name="leptonx")
def main() -> None:
    """Make a trained JAX model small and fast, compile it ahead of time, and serve it.

    \b
      leptonx plan digits.py:model --recipe int8             what would be done, weight by weight
      leptonx compile digits.py:model --recipe int8          makes digits.lepton
      leptonx bench digits.lepton --target digits.py:model   latency beside the float model's
      leptonx serve digits.lepton                            answers HTTP requests

    A model is named FILE.py:NAME or package.module:NAME, where NAME is a lepton_xla.ModelSpec or a function that gives
    one. Every command takes --json: one JSON document on stdout. Progress and errors go to stderr; what cannot be done
    ends with one line there and exit code 2.
    """
