"""The end of every application: its figures beside their aims, printed and added to build/apps/summary.json."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parent.parent.parent / "build" / "apps"


def write(app: str, figures: Mapping[str, Any], aims: Mapping[str, tuple[str, float]], folder: Any = FOLDER) -> bool:
    """Print figures beside their aims, and add them to the summary.

    Args:
        app: name of the application.
        figures: what was measured.
        aims: figure -> `>=` or `<=`, and a bound.
        folder: where `summary.json` is.

    Returns:
        Whether all aims are met.
    """
    met = {
        name: figures[name] >= bound if sign == ">=" else figures[name] <= bound for name, (sign, bound) in aims.items()
    }
    for name, (sign, bound) in aims.items():
        print(f"  {name:<28}{figures[name]:10.4f}   aim {sign} {bound:g}: {'met' if met[name] else 'MISSED'}")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "summary.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known[app] = {**figures, "aims": {name: [*aim, met[name]] for name, aim in aims.items()}}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(known, indent=1) + "\n")
    os.replace(part, file)
    return all(met.values())
