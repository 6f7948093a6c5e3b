"""`leptonx`: the command group. Each command is a click command in a file of its own."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any

import click

from lepton_xla.cli._stdout import stdout_checked
from lepton_xla.errors import LeptonError, first_line

# What `leptonx --help` lists, in order of use. A command's file is imported only when the command runs, so `--help` is
# fast.
COMMANDS = {
    "recipes": "List the presets: recipes that come with leptonx.",
    "plan": "Show what a recipe would do to each site of a model.",
    "sensitivity": "Quantize one weight at a time and rank the errors.",
    "tune": "Find the best recipe within constraints, by measurement.",
    "train": "Train a model, and compress it meanwhile.",
    "federate": "Train on rows that stay with their owners.",
    "size": "Show what training would take, on any devices.",
    "compile": "Optimize a model and compile it into an artifact.",
    "inspect": "Show the contents of an artifact.",
    "verify": "Check every file of an artifact, and its signature.",
    "keys": "Make key pairs to sign and to encrypt with.",
    "sign": "Sign an artifact.",
    "export": "Write an artifact in another framework's format.",
    "encrypt": "Write an encrypted copy of an artifact.",
    "eval": "Compare models on the same rows: metrics, lost classes, cost.",
    "bench": "Compare an artifact's latency with the float model's.",
    "predict": "Run an artifact on input files.",
    "explain": "Show which inputs a class comes from.",
    "generate": "Continue a prompt with an artifact that generates.",
    "map": "Run a large file of rows through an artifact.",
    "teach": "Store a teacher's answers, to train a student on.",
    "serve": "Serve an artifact over HTTP.",
    "weights": "Make and push artifacts of weights alone.",
    "repo": "Push, list, promote and roll back versions of models.",
    "traffic": "Share requests among versions of a model.",
    "rollout": "Bring a new version in by stages, or back.",
    "learn": "Learn from sampled requests while a model is served.",
    "top": "Show live what the models of a server do.",
    "alerts": "Check alert rules, or write them for Prometheus.",
    "load": "Send load to a server and measure its latency.",
    "launch": "Start a command in several processes that train together.",
    "doctor": "Examine this installation and this machine.",
    "token": "Create, list and revoke access tokens for a server.",
}


class OneLineError(click.ClickException):
    """An error that the user can fix: one line on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"leptonx: {' '.join(self.message.split())}", file=file, err=file is None)


def _one_line(error: click.ClickException) -> click.ClickException:
    """Returns the error as one line that names the command's help."""
    if isinstance(error, OneLineError | click.exceptions.NoArgsIsHelpError):
        return error
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return OneLineError(error.format_message().rstrip(".") + hint)


class LeptonGroup(click.Group):
    """A group that imports a command when it runs, and reports errors as one line on stderr with exit code 2."""

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
            if "\0" in arg:  # only from Python; a shell cannot pass one
                raise OneLineError(f"the argument {arg!r} contains a null byte")
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
            raise _ending(OneLineError(str(error))) from error
        except click.ClickException as error:
            raise _ending(_one_line(error)) from error
        except RuntimeError as error:
            if not _is_of_xla(error):
                raise
            raise _ending(OneLineError(f"XLA failed: {first_line(error)}")) from error


def _ending(error: click.ClickException) -> click.ClickException:
    """Returns the error, or ends the process at once if it is one of several.

    JAX would wait minutes at the end of the process for the others, which wait for this one.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return error
    error.show()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, or none
            stream.flush()
    os._exit(error.exit_code)


def _is_of_xla(error: RuntimeError) -> bool:
    """Whether XLA raised this error while compiling or running. Does not import it."""
    jaxlib = sys.modules.get("jaxlib._jax")
    return jaxlib is not None and isinstance(error, jaxlib.JaxRuntimeError)


@click.group(cls=LeptonGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lepton-xla", prog_name="leptonx")
def main() -> None:
    """Make a trained JAX model small and fast, compile it ahead of time, and serve it.

    \b
      leptonx plan digits.py:model --recipe int8             shows what the recipe would do to each weight
      leptonx compile digits.py:model --recipe int8          writes digits.lepton
      leptonx bench digits.lepton --target digits.py:model   compares latency with the float model
      leptonx serve digits.lepton                            serves it over HTTP

    Name a model as FILE.py:NAME or package.module:NAME, where NAME is a lepton_xla.ModelSpec, Program or Generator, or
    a function without arguments that returns one. With --json a command prints one JSON document on stdout. Progress
    and errors go to stderr; a command that fails prints one line there and exits with code 2.
    """
