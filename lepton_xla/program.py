"""A model as a pure function of its weights and its named inputs."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lepton_xla.conversion import Conversion, Converter
from lepton_xla.deferred import jax, jnp
from lepton_xla.derivations import Derivation, Step
from lepton_xla.errors import CompileError, ModelError, first_line
from lepton_xla.trees import abstract, name_leaves, some_names, tree_bytes

if TYPE_CHECKING:
    from jaxtyping import Array, Bool

    from lepton_xla.report import PassReport

type Weights = dict[str, Any]
"""Weights by path (`params/Dense_0/kernel`): arrays, or pytrees of arrays such as `QTensor`."""

# Units of the sizes at which a program is traced: multiples of 8 first, because a sharded dimension must be divisible
# by its mesh axis; then 1, because a table of positions may be short.
_PROBE_UNITS = (8, 1)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one input or output.

    Attributes:
        shape: ints, and names for symbolic dimensions: `("batch", 28, 28, 1)`.
        dtype: the name of a NumPy or ml_dtypes dtype, such as `"float32"` or `"bfloat16"`.

    Raises:
        ModelError: for a negative dimension, an empty name or an unknown dtype.

    >>> image = lx.TensorSpec(("batch", 28, 28, 1), "float32")
    >>> print(image, image.symbols, image.at({"batch": 8}).shape)
    float32[batch, 28, 28, 1] ('batch',) (8, 28, 28, 1)
    """

    shape: tuple[int | str, ...]
    dtype: str

    def __post_init__(self) -> None:
        if isinstance(self.shape, str) or not isinstance(self.shape, Iterable):
            raise ModelError(f"TensorSpec: the shape {self.shape!r} is not a tuple such as ('batch', 28)")
        object.__setattr__(self, "shape", tuple(self.shape))
        for dim in self.shape:
            valid = isinstance(dim, int) and dim >= 0
            if isinstance(dim, str):  # names become part of file names, and jax.export parses them
                valid = dim.isidentifier() and dim.isascii()
            if not valid:
                raise ModelError(
                    f"TensorSpec{self.shape}: dimension {dim!r} is neither a size >= 0 nor a name like 'batch'"
                )
        try:
            if self.dtype is None:  # NumPy would take None as float64
                raise TypeError
            object.__setattr__(self, "dtype", np.dtype(self.dtype).name)
        except TypeError as error:
            raise ModelError(f"TensorSpec{self.shape}: unknown dtype {self.dtype!r}") from error

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the symbolic dimensions, in order."""
        return tuple(dim for dim in self.shape if isinstance(dim, str))

    def at(self, sizes: Mapping[str, int]) -> jax.ShapeDtypeStruct:
        """Replace every symbolic dimension by its size.

        Raises:
            ModelError: if `sizes` lacks a name.
        """
        return jax.ShapeDtypeStruct(self.shape_at(sizes), np.dtype(self.dtype))

    def shape_at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where every symbolic dimension is replaced by its size.

        Raises:
            ModelError: if `sizes` lacks a name.

        >>> lx.TensorSpec(("batch", 4), "float32").shape_at({"batch": 8})
        (8, 4)
        """
        missing = [name for name in self.symbols if name not in sizes]
        if missing:
            raise ModelError(f"no size given for dimension {missing[0]!r}; sizes given: {dict(sizes)}")
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Expansion:
    """A variant of a program whose weights are unpacked once, on loading, instead of on each call.

    Attributes:
        expand: `expand(stored_weights) -> expanded_weights`, any pytree.
        fn: `fn(expanded_weights, *inputs) -> outputs`; the outputs equal those of the program's `fn`.

    >>> whole = Expansion(lambda weights: {"w": weights["codes"] * 0.5}, lambda weights, x: x @ weights["w"])
    >>> whole.fn(whole.expand({"codes": np.eye(2, dtype=np.float32)}), np.ones((1, 2), np.float32)).tolist()
    [[0.5, 0.5]]
    """

    expand: Callable[[Weights], Any]
    fn: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What is known of a program that generates tokens: `Generator` makes such programs.

    Attributes:
        slots: number of sequences that are decoded together.
        capacity: number of positions of a sequence in the cache.
        vocabulary: number of tokens.
        cache: shape and dtype of each array of the cache, for all slots.
        axes: of each array of the cache, the axis of its slots.
        first_position: position of the first token that is decoded after a prompt; None if it is the prompt's length.
        end_tokens: tokens that end a sequence.
        tokenizer: a tokenizer's JSON, as Hugging Face's `tokenizers` writes it; empty without one.
        position_axes: of each array of the cache, the axis of its positions; None if it has none.
        cache_codes: the format that the cache is stored in; `none` as it is.

    >>> Generation(8, 256, 32_000, (TensorSpec((8, 256, 64), "float32"),), (0,)).slots
    8
    """

    slots: int
    capacity: int
    vocabulary: int
    cache: tuple[TensorSpec, ...]
    axes: tuple[int, ...]
    first_position: int | None = None
    end_tokens: tuple[int, ...] = ()
    tokenizer: bytes = b""
    position_axes: tuple[int | None, ...] = ()
    cache_codes: Literal["none", "int8"] = "none"


@dataclasses.dataclass(frozen=True)
class Program:
    """A model: a pure function, its weights, and the specs of its inputs and outputs.

    Attributes:
        fn: `fn(weights, *inputs) -> outputs`; `weights` is the flat dict below, `inputs` in the order of `inputs`.
        weights: path -> array, or a pytree of arrays (`QTensor`). Includes model state such as batch statistics.
        inputs: name -> spec, in call order.
        outputs: name -> spec; the names are the paths of the output tree, or `output` for a single array.
        masks: path -> bool array of the weight's shape, for pruned weights: False marks a weight held at zero.
        history: one report per applied pass, oldest first.
        expansion: how weights are unpacked on loading; None if the compiled program runs on the stored ones.
        origin: shapes and dtypes of the weights before the first pass; None if no pass was applied.
        axes: path -> logical names of the weight's axes, for weights that have them; from Flax metadata.
        derivation: the weights before the first pass, and how these come of them; None if no pass was applied, or
            after `optimize`, which keeps them only if it is told to.
        generation: set if it generates tokens: `fn` then computes a prefill and a decoding step, which `compile` parts.

        conversion: what clients send instead of some inputs, and get instead of some outputs; see `take_texts`,
            `take_images`, `take_categories` and `give_labels`.

    Raises:
        ModelError: for a mask without its weight, or of another shape, or a conversion that does not fit.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> print(program.outputs["output"], program.symbols, program.weights_bytes)
    float32[batch, 4] ('batch',) 64
    >>> program(program.weights, jnp.ones((1, 4))).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """

    fn: Callable[..., Any]
    weights: Weights
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    masks: dict[str, Bool[Array, "*_"]] = dataclasses.field(default_factory=dict[str, Any])
    history: tuple[PassReport, ...] = ()
    expansion: Expansion | None = None
    origin: Weights | None = None
    axes: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict[str, tuple[Any, ...]])
    derivation: Derivation | None = None
    generation: Generation | None = None
    conversion: Conversion | None = None

    def __post_init__(self) -> None:
        check_masks(self.masks, self.weights)
        if self.conversion is not None:
            self.conversion.check(
                {name: (spec.shape, spec.dtype) for name, spec in self.inputs.items()},
                {name: spec.dtype for name, spec in self.outputs.items()},
            )

    def __call__(self, weights: Weights, *inputs: Any) -> Any:
        """Run the model; the result has the tree structure of the user's function."""
        return self.fn(weights, *inputs)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the symbolic input dimensions, in order of first appearance."""
        return tuple(dict.fromkeys(name for spec in self.inputs.values() for name in spec.symbols))

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return tree_bytes(self.weights)

    def abstract_inputs(self, sizes: Mapping[str, int]) -> list[jax.ShapeDtypeStruct]:
        """Give the input shapes at these sizes of the symbolic dimensions, in call order.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> [shape.shape for shape in program.abstract_inputs({"batch": 8})]
        [(8, 4)]
        """
        return [spec.at(sizes) for spec in self.inputs.values()]

    def jaxpr(self, sizes: Mapping[str, int]) -> Any:
        """Trace the jaxpr at these sizes, such as `{"batch": 8}`.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> [equation.primitive.name for equation in program.jaxpr({"batch": 8}).eqns]
        ['dot_general']
        """
        return jax.make_jaxpr(self.fn)(abstract(self.weights), *self.abstract_inputs(sizes))

    def named_outputs(self, weights: Weights, *inputs: Any) -> dict[str, Any]:
        """Run the model and returns its outputs by name.

        >>> program = lx.trace(lambda w, x: (x, x @ w), jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> list(program.named_outputs(program.weights, jnp.ones((1, 4))))
        ['output_0', 'output_1']
        """
        return name_leaves(self.fn(weights, *inputs), single="output")

    def converted(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Convert what clients send into the program's inputs, as the compiled model will; others stay as they are.

        Raises:
            InputError: for a value that cannot be converted; names its row.

        >>> inputs = {"color": lx.TensorSpec(("batch",), "int32")}
        >>> program = lx.trace(lambda w, color: w[color], jnp.ones(3), inputs)
        >>> program = lx.take_categories(program, "color", ["red", "blue"])
        >>> program.converted({"color": ["blue", "pink"]})["color.index"].tolist()
        [2, 0]
        """
        return dict(inputs) if self._converter is None else self._converter(inputs)

    @functools.cached_property
    def _converter(self) -> Converter | None:
        if self.conversion is None:
            return None
        return Converter(self.conversion, {name: spec.shape for name, spec in self.inputs.items()})

    def derived(self, *steps: Step) -> Derivation:
        """The derivation of weights that these steps make of the program's.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> [step.name for step in lx.passes.cast(program).derivation.steps]
        ['cast']
        """
        known = self.derivation or Derivation(self.weights)
        return Derivation(known.weights, (*known.steps, *steps))

    def replace(self, **changes: Any) -> Program:
        """Return a copy with the given fields changed.

        A new `fn` drops `expansion`, which belongs to the old one. The first `history` sets `origin` to the shapes of
        the current weights.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> program.replace(weights={"weights": 2 * jnp.eye(4)}).weights["weights"][0].tolist()
        [2.0, 0.0, 0.0, 0.0]
        """
        if "fn" in changes:
            changes.setdefault("expansion", None)
        if changes.get("history") and self.origin is None:
            changes.setdefault("origin", abstract(self.weights))
        return dataclasses.replace(self, **changes)


def check_masks(masks: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Check that masks belong to these weights. The shape of a quantized weight differs from its mask's and is not
    checked.

    Raises:
        ModelError: for a mask without its weight, or of another shape.

    >>> check_masks({"v": np.ones(2, bool)}, {"w": np.ones(2)})
    Traceback (most recent call last):
    lepton_xla.errors.ModelError: mask 'v' has no weight; the weights are w
    """
    for path, mask in masks.items():
        if path not in weights:
            raise ModelError(f"mask {path!r} has no weight; the weights are {some_names(weights)}")
        shape, wanted = tuple(np.shape(mask)), tuple(np.shape(weights[path]))
        if shape != wanted and jax.tree_util.all_leaves([weights[path]]):
            raise ModelError(
                f"the mask of weight {path!r} has shape {shape}, the weight {wanted}; use masks that were made for "
                "this model"
            )


def as_sizes(name: str, given: Any) -> tuple[int, ...]:
    """Convert the sizes of one dimension, such as NumPy integers, to plain integers.

    Raises:
        CompileError: if there are none, or one is not an integer of at least 1.

    >>> as_sizes("batch", np.array([1, 8, 32]))
    (1, 8, 32)
    """
    sizes = () if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if not sizes:
        raise CompileError(f"buckets[{name!r}] is {given!r}; expected a sequence of sizes, such as (1, 8, 32)")
    plain: list[int] = []
    for size in sizes:
        try:
            plain.append(0 if isinstance(size, bool) else operator.index(size))
        except TypeError:
            plain.append(0)
        if plain[-1] < 1:
            raise CompileError(f"buckets[{name!r}] holds {size!r}; a size is an integer of at least 1")
    return tuple(plain)


def trace(fn: Callable[..., Any], weights: Any, inputs: Mapping[str, TensorSpec]) -> Program:
    """Make a `Program` from any JAX function.

    Args:
        fn: `fn(weights, *inputs) -> outputs`, traceable by `jax.jit`. Constants that it closes over stay constants;
            whatever should be compressed or updated must be in `weights`.
        weights: a pytree of arrays; its paths become the weights' names. A typed PRNG key becomes its data, `uint32`.
        inputs: name -> spec, in call order; any printable names.

    Returns:
        The program, with output names, shapes and symbolic dimensions inferred by abstract evaluation.

    Raises:
        ModelError: if `fn` cannot be traced at these inputs, a weight is not an array, an input has no usable name or
            its dtype is disabled in JAX, or the size of an output depends on a symbolic dimension without being equal
            to it.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> print(list(program.weights), program.outputs["output"])
    ['w'] float32[batch, 4]
    """
    named = name_leaves(weights, prefix="weights")
    treedef = jax.tree.structure(weights)
    arrays = {name: _weight_array(name, leaf) for name, leaf in named.items()}
    keys = {name: jax.random.key_impl(leaf) for name, leaf in named.items() if _is_key(leaf)}
    names = tuple(named)  # not the arrays, which would live as long as any program that is made of this one

    def flat_fn(flat: Weights, *args: Any) -> Any:
        leaves = [
            jax.random.wrap_key_data(flat[name], impl=keys[name]) if name in keys else flat[name] for name in names
        ]
        return fn(jax.tree.unflatten(treedef, leaves), *args)

    if not isinstance(inputs, Mapping):
        raise ModelError(f"the inputs are a {type(inputs).__name__}, not a mapping such as {{'x': TensorSpec(...)}}")
    specs = dict(inputs)
    _check_names("input", specs)
    for name, spec in specs.items():
        if not isinstance(spec, TensorSpec):
            raise ModelError(
                f"input {name!r} is a {type(spec).__name__}, not a TensorSpec such as TensorSpec((4,), 'int8')"
            )
        narrow = jax.dtypes.canonicalize_dtype(spec.dtype).name
        if narrow != spec.dtype:
            raise ModelError(
                f"input {name!r} is {spec.dtype}, which JAX computes as {narrow} unless jax_enable_x64 is set"
            )
    return Program(flat_fn, arrays, specs, infer_outputs(flat_fn, arrays, specs))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _weight_array(name: str, leaf: Any) -> jax.Array:
    """Convert a leaf to an array of a program."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ModelError(f"weight {name!r} is a {type(leaf).__name__}, not an array")
    try:
        return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # unsupported dtype, no memory, no device
        raise ModelError(
            f"weight {name!r}, {leaf.dtype}{list(leaf.shape)}, cannot be made a JAX array: {first_line(error)}"
        ) from error


def _check_names(what: str, names: Iterable[Any]) -> None:
    """Check that names are printable and have no blanks at their ends: they occur in files, requests and messages."""
    for name in names:
        if not isinstance(name, str) or not name or not name.isprintable() or name != name.strip():
            raise ModelError(f"{what} name {name!r}: expected printable text without blanks at its ends, such as 'x'")


def infer_outputs(fn: Callable[..., Any], weights: Weights, inputs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Infer output names and specs of `fn` by abstract evaluation at two sizes of each symbolic dimension.

    Raises:
        ModelError: as `trace`.

    >>> infer_outputs(lambda w, x: {"mean": x.mean(axis=1)}, {}, {"x": TensorSpec(("batch", 4), "float32")})
    {'mean': TensorSpec(shape=('batch',), dtype='float32')}
    """
    base, unit = probe_sizes(fn, weights, inputs)
    reference = abstract_outputs(fn, weights, inputs, base)
    shapes: dict[str, list[int | str]] = {name: list(leaf.shape) for name, leaf in reference.items()}
    for symbol in base:
        changed = abstract_outputs(fn, weights, inputs, {**base, symbol: base[symbol] + unit})
        if _ranks(changed) != _ranks(reference):
            raise ModelError(f"the names or ranks of the outputs change with the size of {symbol!r}")
        for name, leaf in changed.items():
            for axis, (before, after) in enumerate(zip(reference[name].shape, leaf.shape, strict=True)):
                if before == after:
                    continue
                if before != base[symbol] or after - before != unit:
                    raise ModelError(
                        f"output {name!r}: dimension {axis} is {before} at {symbol}={base[symbol]} and {after} at "
                        f"{symbol}={base[symbol] + unit}; an output dimension must equal {symbol} or be fixed"
                    )
                shapes[name][axis] = symbol
    _check_names("output", reference)
    return {name: TensorSpec(tuple(shapes[name]), leaf.dtype.name) for name, leaf in reference.items()}


def _ranks(outputs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
    return {name: len(leaf.shape) for name, leaf in outputs.items()}


def probe_sizes(
    fn: Callable[..., Any], weights: Weights, inputs: Mapping[str, TensorSpec]
) -> tuple[dict[str, int], int]:
    """Find distinct sizes of the symbolic dimensions at which `fn` can be traced, and the unit between them.

    Raises:
        ModelError: if `fn` cannot be traced at any of the tried sizes.

    >>> probe_sizes(lambda w, x: x, {}, {"x": TensorSpec(("batch", "seq"), "float32")})
    ({'batch': 16, 'seq': 32}, 8)
    """
    symbols = tuple(dict.fromkeys(name for spec in inputs.values() for name in spec.symbols))
    for unit in _PROBE_UNITS:
        # All sizes, with and without an added unit, are distinct, so that no symbol can be confused with another.
        sizes = {name: unit * (2 * index + 2) for index, name in enumerate(symbols)}
        try:
            for symbol in symbols:
                abstract_outputs(fn, weights, inputs, {**sizes, symbol: sizes[symbol] + unit})
            abstract_outputs(fn, weights, inputs, sizes)
        except ModelError:
            if unit == _PROBE_UNITS[-1]:
                raise
        else:
            return sizes, unit
    raise AssertionError("unreachable")


def abstract_outputs(
    fn: Callable[..., Any], weights: Weights, inputs: Mapping[str, TensorSpec], sizes: Mapping[str, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Find the shapes and dtypes of the outputs at sizes of the symbolic dimensions.

    Raises:
        ModelError: if `fn` cannot be traced at these sizes.

    >>> abstract_outputs(lambda w, x: x.T, {}, {"x": TensorSpec(("batch", 4), "float32")}, {"batch": 2})["output"].shape
    (4, 2)
    """
    try:
        out = jax.eval_shape(fn, abstract(weights), *(spec.at(sizes) for spec in inputs.values()))
    except ModelError:
        raise
    except Exception as error:
        at = ", ".join(f"{name}: {spec}" for name, spec in inputs.items())
        said = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"the model cannot be traced with inputs {{{at}}} at {dict(sizes)}: {said}") from error
    named = name_leaves(out, single="output")
    if not named:
        raise ModelError("the model returns nothing")
    return named
