"""`leptonx explain`: which inputs a class comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import InputError

_PREFIX, _SEEN = "attribution/", "seen/"
# From what speaks against the class to what speaks for it.
_AGAINST, _FOR = "=-.", ":+#@"
_MOST_ROWS = 5
_WIDEST = 72  # characters of a heat map of pixels; one is twice as high as it is wide
_COMPLETE = 0.05


@click.command()
@click.argument("path")
@click.option(
    "--input",
    "sources",
    multiple=True,
    required=True,
    metavar="NAME=FILE.npy|NAME=FILE.jpg|NAME=FILE.txt|FILE.npz|FILE.json|-",
    help="Inputs, as of `leptonx predict`. Repeatable.",
)
@click.option("--target", type=click.IntRange(0), metavar="CLASS", help="The class. By default the most likely one.")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Features to show of each input.")
@_common.json_option
def explain(path: str, *, sources: tuple[str, ...], target: int | None, top: int, as_json: bool) -> None:
    """Show which inputs a class comes from, by the artifact at PATH that `compile --explain` wrote.

    The features that count most are listed, with their sign, tokens by name; of an image, and of any other input of two
    dimensions, there is a heat map: @ # + : speak for the class, = - against it.

    \b
      leptonx compile digits.py:model --explain gradients -o digits.lepton
      leptonx explain digits-explain.lepton --input image=images.npy
      leptonx explain intents-explain.lepton --input text=question.txt
    """
    with _common.progress() as step:
        step("load JAX")
        import numpy as np

        from lepton_xla.cli import _arrays
        from lepton_xla.compiler import load

        inputs = _arrays.read_all(sources)
        step(f"load {path}")
        servable = load(path)
        if "target" not in servable.inputs or not any(name.startswith(_PREFIX) for name in servable.outputs):
            raise InputError(f"{path} gives no attributions; write one that does by leptonx compile --explain")
        declared = _arrays.as_declared(inputs, servable.inputs)
        first = next(iter(declared.values()), None)
        # A value without rows gets none here; the artifact says what is wrong with it.
        rows = len(first) if isinstance(first, list) or (isinstance(first, np.ndarray) and first.ndim) else 0
        declared["target"] = np.full(rows, -1 if target is None else target, np.int32)
        step("explain")
        found = servable(**declared)
    rows_found = [{name: np.asarray(each[row]) for name, each in found.items()} for row in range(rows)]
    if as_json:
        _common.print_json({"path": path, "rows": [_document(row, top) for row in rows_found]})
        return
    for place, row in enumerate(rows_found[:_MOST_ROWS]):
        _show(place, row, top)
    if rows > _MOST_ROWS:
        _common.show(f"{rows - _MOST_ROWS} more rows; --json has all")


def _document(row: Mapping[str, Any], top: int) -> dict[str, Any]:
    parts = {name.removeprefix(_PREFIX): each for name, each in row.items() if name.startswith(_PREFIX)}
    words = {name: row[_SEEN + name] for name in parts if _SEEN + name in row and row[_SEEN + name].dtype.kind == "U"}
    return {
        "target": int(row["target"]),
        **({"label": str(row["label"])} if "label" in row else {}),
        "score": float(row["score"]),
        "baseline": float(row["baseline"]),
        "explained": float(sum(each.sum() for each in parts.values())),
        "attributions": {name: each.tolist() for name, each in parts.items()},
        **({"tokens": {name: each.tolist() for name, each in words.items()}} if words else {}),
        "top": {name: _largest(each, top, words.get(name)) for name, each in parts.items()},
    }


def _largest(values: Any, top: int, words: Any) -> list[dict[str, Any]]:
    import numpy as np

    order = np.argsort(-np.abs(values), axis=None, kind="stable")[:top]
    places = [tuple(map(int, np.unravel_index(place, values.shape))) for place in order]
    return [
        {
            "at": list(place),
            **({} if words is None else {"token": str(words[place])}),
            "attribution": float(values[place]),
        }
        for place in places
    ]


def _show(place: int, row: Mapping[str, Any], top: int) -> None:
    document = _document(row, top)
    change = document["score"] - document["baseline"]
    label = f" ({document['label']})" if "label" in document else ""
    said = (
        f"row {place}: class {document['target']}{label}, score {document['score']:.4g}, "
        f"baseline {document['baseline']:.4g}"
    )
    gap = abs(document["explained"] - change)
    lines = [said, f"attributions add up to {document['explained']:.4g} of {change:.4g}"]
    if gap > _COMPLETE * max(abs(change), 1e-6):
        lines[1] += ": by gradients they should; where products are rounded, or by occlusion, they need not"
    _common.show(*lines)
    for name, largest in document["top"].items():
        values = row[_PREFIX + name]
        shape = [size for size in values.shape if size != 1]
        size = row.get(f"{_SEEN}{name.removesuffix('.pixels')}.size")  # of an image that was read from a file
        if size is not None:
            _common.show(*_heat_map(_shrunk(values, size)))
        elif len(shape) == 2 and shape[1] <= 100:
            _common.show(*_heat_map(values.reshape(shape)))
        token = name in document.get("tokens", {})
        cells = [
            (
                *([each["token"]] if token else []),
                ", ".join(map(str, each["at"])),
                f"{each['attribution']:+.4g}",
            )
            for each in largest
        ]
        _common.show(_common.table(name, (*(["token"] if token else []), "at", ">attribution"), cells))


def _shrunk(values: Any, size: Any) -> Any:
    """The sums of the attributions of an image's pixels in cells of a picture of characters."""
    import numpy as np

    real = values[: int(size[0]), : int(size[1])].sum(-1)
    wide = -(-real.shape[1] // _WIDEST)
    high = 2 * wide if wide > 1 else 1
    padded = np.pad(real, ((0, -real.shape[0] % high), (0, -real.shape[1] % wide)))
    return padded.reshape(padded.shape[0] // high, high, -1, wide).sum((1, 3))


def _heat_map(values: Any) -> list[str]:
    """A picture of characters, in parts of the largest magnitude."""
    largest = max(float(abs(values).max()), 1e-30)

    def drawn(value: float) -> str:
        share = abs(value) / largest
        if share < 0.1:
            return " "
        marks = _FOR if value > 0 else _AGAINST[1::-1]
        return marks[min(len(marks) - 1, int(share * len(marks)))]

    return ["".join(drawn(float(value)) for value in line).rstrip() or " " for line in values]
