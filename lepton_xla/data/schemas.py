"""What columns hold, and the statistics of training rows that a model then carries.

The statistics of numbers are weights of the program, those of words its vocabulary, so both are in the artifact. One
function computes with them, whoever trains or serves.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.conversion import Categories, Conversion, Converter
from lepton_xla.data.rows import Rows, columns_of
from lepton_xla.errors import InputError, ModelError
from lepton_xla.program import Expansion, Program
from lepton_xla.raw_inputs import take_categories


@dataclasses.dataclass(frozen=True)
class Number:
    """A column of numbers; NaN and None are missing.

    Attributes:
        missing: what stands for a missing number: the median or mean of the training rows, or a number. None refuses
            rows to train on without it.
        outliers: `clip` brings numbers beyond `quantiles` of the training rows to these; `keep` keeps them.
        quantiles: the lowest and the highest.
        standardize: whether to subtract the mean and divide by the standard deviation, of what is clipped.
        least, most: what a number to train on must not exceed; else it is an error, not an outlier.

    >>> from lepton_xla.data import Number
    >>> Number(missing=0.0).outliers
    'clip'
    """

    missing: Literal["median", "mean"] | float | None = "median"
    outliers: Literal["clip", "keep"] = "clip"
    quantiles: tuple[float, float] = (0.005, 0.995)
    standardize: bool = True
    least: float = -np.inf
    most: float = np.inf


@dataclasses.dataclass(frozen=True)
class Category:
    """A column of words; None and the empty word are missing, which is as any other word that is not known.

    Attributes:
        least: rows that a word must be in to have an index of its own.
        most: number of words, the most frequent ones.

    >>> from lepton_xla.data import Category
    >>> Category(least=5).most
    10000
    """

    least: int = 1
    most: int = 10_000


@dataclasses.dataclass(frozen=True)
class Schema:
    """What the columns of a table hold.

    Attributes:
        columns: name -> kind. Other columns, such as labels, are left alone.

    >>> from lepton_xla.data import Category, Number, Schema
    >>> schema = Schema({"age": Number(), "city": Category()})
    >>> prepared = schema.fit({"age": [20.0, 40.0, np.nan], "city": ["Bern", "Rom", "Rom"]})
    >>> prepared.vocabularies, prepared({"age": [30.0], "city": ["Paris"]})["city"].tolist()
    ({'city': ('Rom', 'Bern')}, [0])
    """

    columns: Mapping[str, Number | Category]

    def check(self, rows: Rows) -> dict[str, np.ndarray]:
        """Check rows against the schema; give its columns, numbers as float64 with NaN for what is missing.

        Raises:
            InputError: for a column that is not there or a value that cannot be; names the first row.

        >>> from lepton_xla.data import Number, Schema
        >>> Schema({"age": Number(least=0)}).check({"age": [3, -1]})
        Traceback (most recent call last):
        lepton_xla.errors.InputError: column 'age', row 1: -1 is less than 0
        """
        found = columns_of(rows)
        missing = [name for name in self.columns if name not in found]
        if missing:
            raise InputError(f"column {missing[0]!r} is missing; there are {', '.join(map(repr, found))}")
        return {
            name: _numbers(name, kind, found[name]) if isinstance(kind, Number) else _words(name, found[name])
            for name, kind in self.columns.items()
        }

    def fit(self, rows: Rows) -> Prepared:
        """Find the statistics of training rows; give no others, or they tell of what is judged.

        Raises:
            InputError: as `check`; for no rows; for a missing number where none may be.

        >>> from lepton_xla.data import Number, Schema
        >>> Schema({"age": Number()}).fit({"age": [1.0, 3.0]}).numbers["age"].tolist()
        [2.0, 1.0099999904632568, 2.990000009536743, 2.0, 0.9900000095367432]
        """
        numbers: dict[str, np.ndarray] = {}
        vocabularies: dict[str, tuple[str, ...]] = {}
        for name, values in self.check(rows).items():
            kind = self.columns[name]
            if not len(values):
                raise InputError("there are no rows to find statistics of")
            if isinstance(kind, Number):
                numbers[name] = _statistics(name, kind, values)
            else:
                counts = Counter(str(word) for word in values.tolist() if word)
                ordered = sorted(counts, key=lambda word, counts=counts: (-counts[word], word))
                vocabularies[name] = tuple(word for word in ordered[: kind.most] if counts[word] >= kind.least)
        return Prepared(self, numbers, vocabularies)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A schema with the statistics of training rows: `Schema.fit` makes it.

    Attributes:
        schema: the schema.
        numbers: column -> float32: what stands for missing, lowest, highest, mean, standard deviation.
        vocabularies: column -> words, of which the n-th has the index n + 1; 0 is any other.

    >>> from lepton_xla.data import Number, Schema
    >>> prepared = Schema({"age": Number()}).fit({"age": [1.0, 3.0]})
    >>> prepared({"age": [2.0, None, 1e9]})["age"].round(3).tolist()
    [0.0, 0.0, 1.0]
    """

    schema: Schema
    numbers: dict[str, np.ndarray]
    vocabularies: dict[str, tuple[str, ...]]

    def __call__(self, rows: Rows) -> dict[str, np.ndarray]:
        """Prepare rows to train on: float32 for numbers, int32 for words; other columns stay as they are.

        Raises:
            InputError: as `Schema.check`.
        """
        checked = self.schema.check(rows)
        steps = {name: Categories(vocabulary=words, index=name) for name, words in self.vocabularies.items()}
        convert = Converter(Conversion(inputs=dict(steps)), dict.fromkeys(steps, ("rows",)))
        found = {name: np.asarray(values) for name, values in rows.items()}
        for name, values in checked.items():
            if name in self.numbers:
                found[name] = np.asarray(_prepare(jnp.asarray(values, jnp.float32), self.numbers[name]))
            else:
                found |= convert({name: values})
        return found

    def attach(self, program: Program) -> Program:
        """Have a program that takes prepared columns take raw ones: numbers with NaN for missing, and words.

        Args:
            program: takes a float input for each number of the schema, `[rows]`, and an int32 one for each word.

        Raises:
            ModelError: if it takes other inputs.

        >>> from lepton_xla.data import Number, Schema
        >>> program = lx.trace(lambda w, age: w * age, jnp.ones(()), {"age": lx.TensorSpec(("batch",), "float32")})
        >>> program = Schema({"age": Number()}).fit({"age": [1.0, 3.0]}).attach(program)
        >>> lx.compile(program, {"batch": (1,)}).servable()(age=[np.nan, 1e9])["output"].round(3).tolist()
        [0.0, 1.0]
        """
        for name in self.schema.columns:
            if name not in program.inputs:
                raise ModelError(f"the program has no input {name!r}; it has {', '.join(map(repr, program.inputs))}")
            if name in self.numbers and not jnp.issubdtype(program.inputs[name].dtype, jnp.floating):
                raise ModelError(f"input {name!r} is {program.inputs[name]}; a prepared number is a float")
        paths = {name: f"data/{name}" for name in self.numbers}
        taken = [path for path in paths.values() if path in program.weights]
        if taken:
            raise ModelError(f"there is a weight {taken[0]!r} already: were these columns attached before?")
        names, inner = list(program.inputs), set(paths.values())

        def own(weights: Any) -> dict[str, Any]:
            """The weights of the program as it was."""
            return {path: leaf for path, leaf in weights.items() if path not in inner}

        def around(fn: Callable[..., Any]) -> Callable[..., Any]:
            def whole(weights: Any, *args: Any) -> Any:
                given = dict(zip(names, args, strict=True))
                for name, path in paths.items():
                    given[name] = _prepare(given[name], weights[path])
                return fn(own(weights), *given.values())

            return whole

        statistics = {path: jnp.asarray(self.numbers[name]) for name, path in paths.items()}
        known, expansion = program.expansion, None
        if known is not None:
            unpacked = around(lambda both, *args: known.fn(both["unpacked"], *args))

            def expand(weights: Any) -> Any:
                return {"unpacked": known.expand(own(weights)), **{path: weights[path] for path in inner}}

            expansion = Expansion(expand, unpacked)
        program = program.replace(
            fn=around(program.fn), expansion=expansion, weights={**program.weights, **statistics}
        )  # fmt: skip
        for name, words in self.vocabularies.items():
            program = take_categories(program, name, words)
        return program


@jax.jit
def _prepare(values: Any, statistics: Any) -> Any:
    """Replace what is missing, clip and standardize: the one function for training and serving."""
    missing, lowest, highest, mean, deviation = (statistics[at] for at in range(5))
    whole = jnp.where(jnp.isnan(values), missing.astype(values.dtype), values)
    whole = jnp.clip(whole, lowest.astype(values.dtype), highest.astype(values.dtype))
    return (whole - mean.astype(values.dtype)) / deviation.astype(values.dtype)


def _statistics(name: str, kind: Number, values: np.ndarray) -> np.ndarray:
    known = values[~np.isnan(values)]
    if not len(known):
        raise InputError(f"column {name!r} has no number at all")
    if len(known) < len(values) and kind.missing is None:
        row = int(np.flatnonzero(np.isnan(values))[0])
        raise InputError(f"column {name!r}, row {row}: the number is missing")
    lowest, highest = -np.inf, np.inf
    if kind.outliers == "clip":
        lowest, highest = np.quantile(known, kind.quantiles)
    clipped = np.clip(known, lowest, highest)
    match kind.missing:
        case "median":
            missing = float(np.median(known))
        case "mean":
            missing = float(clipped.mean())
        case None:
            missing = np.nan
        case _:
            missing = float(kind.missing)
    mean, deviation = (clipped.mean(), clipped.std()) if kind.standardize else (0.0, 1.0)
    # A column of one number has no deviation, and says nothing.
    return np.array([missing, lowest, highest, mean, deviation if deviation > 0 else 1.0], np.float32)


def _numbers(name: str, kind: Number, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "biufO" or values.ndim != 1:
        raise InputError(f"column {name!r} is {values.dtype} {list(values.shape[1:])}; expected one number a row")
    found = np.full(len(values), np.nan)
    for row, value in enumerate(values.tolist()):
        if value is None:
            continue
        if isinstance(value, str | bytes) or not np.isscalar(value):
            raise InputError(f"column {name!r}, row {row}: {value!r:.50} is no number")
        number = float(value)  # type: ignore[arg-type]
        for bound, said, beyond in ((kind.least, "less", number < kind.least), (kind.most, "more", number > kind.most)):
            if beyond:
                raise InputError(f"column {name!r}, row {row}: {value:g} is {said} than {bound:g}")
        if np.isinf(number):
            raise InputError(f"column {name!r}, row {row}: {number} is no number to train on")
        found[row] = number
    return found


def _words(name: str, values: np.ndarray) -> np.ndarray:
    found = np.empty(len(values), object)
    for row, value in enumerate(values.tolist()):
        if value is not None and not isinstance(value, str):
            raise InputError(f"column {name!r}, row {row}: {value!r:.50} is no word")
        found[row] = value or ""
    return found
