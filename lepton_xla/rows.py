"""The row dimension: the one along which a server may batch, pad and split requests."""

from __future__ import annotations

from collections.abc import Mapping

from lepton_xla.errors import CompileError
from lepton_xla.program import TensorSpec


def row_symbol(inputs: Mapping[str, TensorSpec]) -> str | None:
    """Find the row dimension: the first dimension of every input that has symbols, and no other dimension of any
    input.

    Inputs without symbols are shared by all rows. Returns None if there is no such symbol; such a model's inputs are
    padded but never split.

    >>> row_symbol({"ids": TensorSpec(("batch", "seq"), "int32"), "temperature": TensorSpec((), "float32")})
    'batch'
    """
    leaders = {spec.shape[0] if spec.shape else None for spec in inputs.values() if spec.symbols}
    if len(leaders) != 1:
        return None
    leader = leaders.pop()
    if not isinstance(leader, str) or any(spec.shape.count(leader) > 1 for spec in inputs.values()):
        return None
    return leader


def check_rows_lead(inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
    """Check that every output has the row dimension first, if the inputs have one.

    Raises:
        CompileError: if an output does not; names it.

    >>> check_rows_lead({"x": TensorSpec(("batch", 4), "int8")}, {"sum": TensorSpec((4,), "int8")})
    Traceback (most recent call last):
    lepton_xla.errors.CompileError: output 'sum' is int8[4], so it does not have one result per row along 'batch'. ...
    """
    symbol = row_symbol(inputs)
    if symbol is None:
        return
    for name, spec in outputs.items():
        if not spec.shape or spec.shape[0] != symbol or spec.shape.count(symbol) > 1:
            raise CompileError(
                f"output {name!r} is {spec}, so it does not have one result per row along {symbol!r}. Return per-row "
                f"results with {symbol!r} first, or give that input dimension a fixed size"
            )
