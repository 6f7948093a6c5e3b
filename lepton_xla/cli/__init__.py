"""`leptonx`: one click command a file, all registered here."""

from __future__ import annotations

import sys

import click

from lepton_xla.errors import LeptonError


class LeptonGroup(click.Group):
    """A group whose commands turn every `LeptonError` into one line on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except LeptonError as error:
            click.echo(f"leptonx: {' '.join(str(error).split())}", err=True)
            sys.exit(2)


@click.group(cls=LeptonGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lepton-xla", prog_name="leptonx")
def main() -> None:
    """Make a trained JAX model small and fast, compile it ahead of time, and serve it."""
