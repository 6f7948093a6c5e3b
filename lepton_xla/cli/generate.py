"""`leptonx generate`: continues a prompt with an artifact."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import InputError


@click.command()
@click.argument("path")
@click.argument("prompt", required=False)
@click.option("--ids", metavar="N,N,...", help="The prompt as token ids, for a model without a tokenizer.")
@click.option("--max-tokens", type=int, metavar="N", help="Largest number of new tokens; 16 by default.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token each time.")
@click.option("--top-k", default=0, show_default=True, help="Draw from this many most likely tokens; 0 for all.")
@click.option("--top-p", default=1.0, show_default=True, help="Draw from the most likely tokens that add up to this.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1, tokens that occurred are rarer.")
@click.option("--seed", type=int, metavar="N", help="Equal seeds draw equal tokens.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends it, and is left out. Repeatable.")
@click.option("--num-beams", default=1, show_default=True, help="Above 1, search with so many beams, one a slot.")
@click.option("--length-penalty", default=1.0, show_default=True, help="Of a search: above 0 favours longer texts.")
@_common.json_option
def generate(path: str, prompt: str | None, *, ids: str | None, as_json: bool, **options: Any) -> None:
    """Continue PROMPT with the artifact at PATH, and print the text, or token ids, as they come.

    PROMPT is a text, for a model that carries a tokenizer; `-` reads it from stdin. Other models take --ids.

    \b
      leptonx generate chat.lepton "Hello" --max-tokens 40
      leptonx generate chat.lepton --ids 5,3,9 --temperature 0.8 --top-p 0.9 --seed 1
    """
    given = _prompt(prompt, ids)
    with _common.progress() as step:
        step("load JAX")
        from lepton_xla.compiler import load

        step(f"load {path}")
        engine = load(path).generator
        sampling: dict[str, Any] = {**options, "stop": tuple(options["stop"])}
        step("read the prompt")
        start = time.perf_counter()
        stream = engine.stream(given, **sampling)
        pieces = [next(stream)]  # errors are told before anything is printed
        first_s = time.perf_counter() - start
    has_text = engine.tokenizer is not None
    _show(pieces[0], has_text, as_json)
    for piece in stream:
        pieces.append(piece)
        _show(piece, has_text, as_json)
    seconds = time.perf_counter() - start
    tokens = [piece.token for piece in pieces if piece.token is not None]
    if as_json:
        _common.print_json(
            {
                "text": "".join(piece.text for piece in pieces),
                "tokens": tokens,
                "first_token_s": first_s,
                "tokens_per_s": (len(tokens) - 1) / (seconds - first_s) if len(tokens) > 1 else None,
            }
        )
    else:
        click.echo()


def _prompt(prompt: str | None, ids: str | None) -> str | list[int]:
    if (prompt is None) == (ids is None):
        raise InputError("give either PROMPT or --ids")
    if ids is not None:
        try:
            return [int(part) for part in ids.split(",")]
        except ValueError as error:
            raise InputError(f"--ids {ids!r}: expected numbers separated by commas, such as 5,3,9") from error
    if prompt != "-":
        return prompt or ""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError("the prompt on stdin is not UTF-8") from error


def _show(piece: Any, has_text: bool, as_json: bool) -> None:
    """Print a piece as it comes."""
    if as_json:
        return
    if has_text:
        click.echo(piece.text, nl=False)
    elif piece.token is not None:
        click.echo(f"{piece.token} ", nl=False)
