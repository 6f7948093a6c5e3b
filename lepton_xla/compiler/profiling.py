"""Profiles a compiled model: what known inputs look like, and what the model makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lepton_xla.compiler.buckets import pad
from lepton_xla.compiler.servable import Servable
from lepton_xla.errors import CompileError, LeptonError
from lepton_xla.generation import Generated
from lepton_xla.generation.rows import PADDED, rows_of
from lepton_xla.profiles import Profile, profile_of
from lepton_xla.program import TensorSpec

# More rows do not make the bins better, and all are held in memory at once.
_MOST_ROWS = 8192
_MOST_BYTES = 256 << 20


def profile(servable: Servable, batches: Iterable[Mapping[str, Any]]) -> Profile | None:
    """The profile of a model's inputs and outputs.

    Args:
        servable: the model.
        batches: inputs by name; at most the first 8,192 rows and 256 MiB are read. Of a model that generates, prompts
            as `prompt` and how they are continued, such as `{"prompt": ["Hello"], "max_tokens": 40}`.

    Returns:
        The profile; None for a model without rows, or without data.

    Raises:
        CompileError: if a batch does not fit the model.
    """
    if servable.stepper is not None:
        return _profile_of_replies(servable, batches)
    rows_symbol = servable.row_symbol
    if rows_symbol is None or not all(rows_symbol in spec.symbols for spec in servable.outputs.values()):
        return None
    converter = servable.converter
    largest = {name: sizes[-1] for name, sizes in servable.buckets.items()}
    found: dict[str, list[np.ndarray]] = {}
    rows = nbytes = 0
    for number, batch in enumerate(batches):
        try:
            converted = batch if converter is None else converter(batch)
            arrays = {name: np.asarray(converted[name]) for name in servable.inputs if name in converted}
            outputs = servable.compute(**arrays)
        except LeptonError as error:
            raise CompileError(f"batch {number} of the data to profile does not fit the model: {error}") from error
        inputs = {name: array for name, array in arrays.items() if rows_symbol in servable.inputs[name].symbols}
        size = len(next(iter(inputs.values())))
        specs = {**servable.inputs, **servable.outputs}
        for name, array in (*inputs.items(), *outputs.items()):
            # Rows of other lengths are padded to the same, as the server does.
            whole = pad(array, specs[name].at({**largest, rows_symbol: size}).shape)
            found.setdefault(name, []).append(whole)
            nbytes += whole.nbytes
        rows += size
        if rows >= _MOST_ROWS or nbytes >= _MOST_BYTES:
            break
    if not rows:
        return None
    joined = {name: np.concatenate(parts)[:_MOST_ROWS] for name, parts in found.items()}
    return profile_of(
        {name: joined[name] for name in servable.inputs if name in joined},
        {name: joined[name] for name in servable.outputs},
        [name for name, spec in (*servable.inputs.items(), *servable.outputs.items()) if _is_padded(spec, rows_symbol)],
    )


def _profile_of_replies(servable: Servable, batches: Iterable[Mapping[str, Any]]) -> Profile | None:
    found: list[Generated] = []
    for number, batch in enumerate(batches):
        if "prompt" not in batch:
            raise CompileError(f"batch {number} of the data to profile has no 'prompt', a list of prompts")
        options = {name: value for name, value in batch.items() if name != "prompt"}
        prompts = batch["prompt"]
        if isinstance(prompts, list | tuple | np.ndarray):  # anything else is refused
            prompts = list(prompts[: _MOST_ROWS - len(found)])
        try:
            found += servable.generator.generate(prompts, **options)
        except LeptonError as error:
            raise CompileError(f"batch {number} of the data to profile does not fit the model: {error}") from error
        if len(found) >= _MOST_ROWS:
            break
    if not found:
        return None
    assert servable.stepper is not None
    return profile_of(*rows_of(found, servable.stepper), PADDED)


def _is_padded(spec: TensorSpec, rows_symbol: str) -> bool:
    return bool(set(spec.symbols) - {rows_symbol})
