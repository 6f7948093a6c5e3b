"""`leptonx recipes`: lists and prints the presets."""

from __future__ import annotations

import click

from lepton_xla.cli import _common


@click.command()
@click.argument("name", required=False)
@_common.json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the presets (recipes that come with leptonx), or print one as TOML.

    \b
      leptonx recipes                       names and descriptions
      leptonx recipes int8 > mine.toml      copies a preset to edit it
      leptonx plan digits.py:model --recipe mine.toml
    """
    from lepton_xla.recipe import Recipe, preset_text, presets

    if name is not None:
        text = preset_text(name)
        if as_json:
            import msgspec

            _common.print_json({"name": name, "toml": text, "recipe": msgspec.to_builtins(Recipe.load(name))})
        else:
            click.echo(text, nl=not text.endswith("\n"))
        return
    found = [{"name": preset, "description": Recipe.load(preset).description} for preset in presets()]
    if as_json:
        _common.print_json(found)
    else:
        _common.show(_common.table("recipes", ("name", "what it does"), [tuple(entry.values()) for entry in found]))
