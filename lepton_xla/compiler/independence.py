"""Checks, by running the model, that padding and other rows of a batch do not change a row's result."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla import _compat
from lepton_xla.compiler.buckets import BucketSizes, bucket_name, pad
from lepton_xla.compiler.probes import probe
from lepton_xla.deferred import jnp
from lepton_xla.errors import CompileError
from lepton_xla.program import TensorSpec

type Run = Callable[[Mapping[str, int], Sequence[np.ndarray]], list[np.ndarray]]
"""`run(sizes, arrays) -> outputs`: runs the executable of these sizes on arrays of exactly these sizes."""

# Same executable, same position, other neighbours: a kernel computes the row in the same way.
_SAME_TOLERANCE = 1e-3
# Another executable or position: sums may be ordered differently, which in low precision can flip a rounding.
_TOLERANCES = {8: 5e-2, 16: 3e-2, 32: 1e-3, 64: 1e-3}
_ROWS_COMPARED = 2
_TIES = 0.25
# Rows that are this much larger would change a quantization scale that rows must not share.
_STRANGERS_SCALE = 10.0


@dataclasses.dataclass(frozen=True)
class Checked:
    """The model under check.

    Attributes:
        run: runs an executable.
        inputs, outputs: the model's.
        bucket_sizes: symbolic dimension -> compiled sizes.
        tolerance: largest difference allowed between two executables, relative to the largest value of the output.
        examples: real inputs, by name; other inputs are random.
        tables: as in `probe`.
    """

    run: Run
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    bucket_sizes: BucketSizes
    tolerance: float
    examples: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict[str, np.ndarray])
    tables: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])

    @property
    def cure(self) -> str:
        """Advice for a check that fails on random inputs."""
        drawn = [name for name in self.inputs if name not in self.examples]
        if not drawn:
            return ""
        return (
            f". The check used random values for {', '.join(drawn)}; if real values are different, pass some as "
            "compile(examples=...) (on the command line, as the ModelSpec's calibration)"
        )


def product_dtypes(jaxpr: Any) -> set[str]:
    """Dtypes of the operands of all matrix products and convolutions, at any depth.

    >>> sorted(product_dtypes(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((4, 4)))))
    ['float32']
    """
    found: set[str] = set()
    for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
        if eqn.primitive.name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
            found |= {atom.aval.dtype.name for atom in eqn.invars[:2]}
        found = found.union(*(product_dtypes(inner) for inner in _compat.inner_jaxprs(eqn)))
    return found


def default_tolerance(dtypes: Iterable[str]) -> float:
    """The tolerance for the narrowest of the dtypes of a model's weights and products.

    >>> default_tolerance({"float32"}), default_tolerance({"float32", "bfloat16"}), default_tolerance({"int8"})
    (0.001, 0.03, 0.05)
    """
    numbers = [jnp.dtype(name) for name in dtypes if jnp.issubdtype(jnp.dtype(name), jnp.number)]
    bits = [32, *(8 * dtype.itemsize for dtype in numbers if dtype.itemsize < 4)]
    return _TOLERANCES[min(bits)]


def check_rows(model: Checked, symbol: str) -> None:
    """Check that rows along `symbol` do not affect each other.

    Runs rows next to zeros, next to rows ten times as large, at another position, and in every bucket size.

    Raises:
        CompileError: naming the output that differs, and what usually causes it.
    """
    others = {name: compiled_sizes[0] for name, compiled_sizes in model.bucket_sizes.items() if name != symbol}
    compiled_sizes = model.bucket_sizes[symbol]
    rows = _probe(model, {**others, symbol: compiled_sizes[-1]}, seed=0)
    strangers = _probe(model, {**others, symbol: compiled_sizes[-1]}, seed=1, scale=_STRANGERS_SCALE)

    def run(size: int, row: int, position: int, around: Sequence[np.ndarray] | None) -> list[np.ndarray]:
        """Output rows for one input row at a position, among strangers or zeros."""
        arrays = list(rows)
        for index, spec in enumerate(model.inputs.values()):
            if symbol in spec.symbols:
                arrays[index] = np.zeros_like(rows[index][:size]) if around is None else around[index][:size].copy()
                arrays[index][position] = rows[index][row]
        return [output[position] for output in model.run({**others, symbol: size}, arrays)]

    compare = functools.partial(_compare, cure=model.cure)
    conclusive = dict.fromkeys(model.outputs, False)
    why = f"the rows along {symbol!r} affect each other, so they cannot be batched or padded"
    for row in range(min(_ROWS_COMPARED, compiled_sizes[-1])):
        alone = run(compiled_sizes[0], row, 0, None)
        for size in compiled_sizes:
            where = bucket_name({**others, symbol: size})
            padded = alone if size == compiled_sizes[0] else run(size, row, 0, None)
            # A batch of one has no other rows and no other position.
            beside, last = [run(size, row, place, strangers) if size > 1 else padded for place in (0, -1)]
            for index, name in enumerate(model.outputs):
                same = compare(beside[index], padded[index], _SAME_TOLERANCE, name, f"{why}: next to other rows", where)
                compare(padded[index], alone[index], model.tolerance, name, f"{why}: in a larger batch", where)
                compare(last[index], alone[index], model.tolerance, name, f"{why}: at another position", where)
                conclusive[name] |= same
    _require_conclusive(conclusive)


def check_padding(model: Checked, symbol: str, small: int, large: int, rows: str | None) -> None:
    """Check that zero padding along `symbol`, from `small` to `large`, does not change the results of the real part.

    Raises:
        CompileError: naming the output that differs, and what usually causes it.
    """
    sizes = {
        name: compiled_sizes[0] if name == rows else compiled_sizes[-1]
        for name, compiled_sizes in model.bucket_sizes.items()
    }
    # No zeros: a row of zeros looks like padding, and has no result of its own.
    real = _probe(model, {**sizes, symbol: small}, seed=2, lowest=1)
    padded = [
        pad(array, spec.at({**sizes, symbol: large}).shape)
        for array, spec in zip(real, model.inputs.values(), strict=True)
    ]
    expected = model.run({**sizes, symbol: small}, real)
    found = model.run({**sizes, symbol: large}, padded)
    why = (
        f"inputs shorter than a bucket are padded with zeros along {symbol!r}, which changes this model's results. "
        f"Mask the padding inside the model, or give that dimension a fixed size: padded from {small} to {large}"
    )
    compare = functools.partial(_compare, cure=model.cure)
    conclusive: dict[str, bool] = {}
    for (name, spec), reference, output in zip(model.outputs.items(), expected, found, strict=True):
        cut = tuple(slice(small) if dim == symbol else slice(None) for dim in spec.shape)
        where = bucket_name({**sizes, symbol: large})
        conclusive[name] = compare(output[cut], reference, model.tolerance, name, why, where)
    _require_conclusive(conclusive)


def _probe(
    model: Checked, sizes: Mapping[str, int], *, seed: int, scale: float = 1.0, lowest: int = 0
) -> list[np.ndarray]:
    return probe(model.inputs, sizes, model.examples, model.tables, seed=seed, scale=scale, lowest=lowest)


def _compare(
    found: np.ndarray, expected: np.ndarray, tolerance: float, name: str, why: str, where: str, *, cure: str
) -> bool:
    """Compare one output; return False if none of its values is finite, so that the comparison shows nothing.

    Raises:
        CompileError: if they differ by more than the tolerance times the largest expected value.
    """
    if not jnp.issubdtype(expected.dtype, jnp.inexact):
        # Indices and flags result from comparisons, and rounding can flip near-ties.
        share = float(np.mean(found != expected)) if expected.size else 0.0
        if share > (0.0 if tolerance == _SAME_TOLERANCE else _TIES):
            raise CompileError(f"{why}, {share:.0%} of the values of output {name!r} differ (bucket {where}){cure}")
        return True
    wide = np.complex128 if jnp.issubdtype(expected.dtype, jnp.complexfloating) else np.float64
    found, expected = found.astype(wide), expected.astype(wide)
    finite = np.isfinite(expected)
    if (np.isfinite(found) != finite).any():
        raise CompileError(f"{why}, output {name!r} becomes not finite (bucket {where}){cure}")
    scale = np.abs(expected[finite]).max(initial=0.0)
    difference = np.abs(found[finite] - expected[finite]).max(initial=0.0)
    if difference > tolerance * scale:
        raise CompileError(
            f"{why}, output {name!r} differs by {difference:.3g} where its largest value is {scale:.3g} "
            f"(bucket {where}). Usual causes: batch statistics, or a softmax, sum or maximum over that "
            f"dimension{cure}"
        )
    return not expected.size or bool(finite.any())


def _require_conclusive(conclusive: Mapping[str, bool]) -> None:
    for name, shown in conclusive.items():
        if not shown:
            raise CompileError(
                f"output {name!r} has no finite value on the test inputs, so the check of rows and padding is "
                "inconclusive; pass real inputs as compile(examples=...)"
            )
