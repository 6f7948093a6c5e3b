"""Models that generate tokens: a prefill and a decoding step with a cache, as one program with one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.adapters.caches import linen_steps, nnx_steps
from lepton_xla.errors import ModelError, first_line
from lepton_xla.program import Generation, Program, TensorSpec, trace
from lepton_xla.trees import abstract, name_leaves

type InitCache = Callable[[Any, int, int], Any]
"""`init_cache(weights, sequences, positions) -> cache`, any pytree of arrays."""


class Generator:
    """A model that generates tokens, decoder-only or encoder-decoder.

    Its `program` is optimized and compiled like any other: both steps share their weights, and so one plan. What
    `compile` makes of it decodes `slots` sequences together.

    Args:
        init_cache: `init_cache(w, B, S)` gives an empty cache for B sequences of S positions. Each of its arrays has
            an axis of size B, and at most one of size S.
        prefill: `prefill(w, tokens[B, S], length[B]) -> (logits[B, V], cache)` reads prompts, padded with zeros behind
            `length`. The logits are those of the token after each prompt. The cache is as of `init_cache(w, B, S)`;
            what it holds behind `length` must not matter to `decode`.
        decode: `decode(w, cache, token[B], position[B]) -> (logits[B, V], cache)` reads one more token of each
            sequence. Positions differ between sequences, and those from `position` on must not matter.
        weights: a pytree of arrays.
        slots: number of sequences that are decoded together.
        capacity: number of positions in the cache of a sequence.
        encoder_decoder: the prompt is read by an encoder. `prefill` then also decodes the start token at position 0, so
            `decode` begins at position 1. Otherwise it begins at the prompt's length.
        end_tokens: tokens that end a sequence.
        tokenizer: a tokenizer's JSON, as Hugging Face's `tokenizers` writes it; without one, prompts are token ids.

    Attributes:
        program: the program, for `optimize` and `compile`; its only symbolic dimension is `length`.

    Raises:
        ModelError: if a function cannot be traced, or does not return what it should; names it.

    >>> def step(w, cache, token, position):  # the next token is the sum of all so far
    ...     total = cache + token
    ...     return jax.nn.one_hot(total % 16, 16) @ w, total
    >>> def prefill(w, tokens, length):  # behind `length` there are zeros
    ...     return step(w, 0, tokens.sum(1), length)
    >>> generator = lx.Generator(lambda w, B, S: jnp.zeros(B, "int32"), prefill, step, jnp.eye(16), slots=2, capacity=8)
    >>> model = lx.compile(generator.program, {"length": (4,)}).servable()
    >>> model.generator.generate([[1, 2], [3]], max_tokens=4)[0].tokens
    (3, 6, 12, 8)
    """

    def __init__(
        self,
        init_cache: InitCache,
        prefill: Callable[..., Any],
        decode: Callable[..., Any],
        weights: Any,
        *,
        slots: int = 8,
        capacity: int = 256,
        encoder_decoder: bool = False,
        end_tokens: Sequence[int] = (),
        tokenizer: bytes | str = b"",
    ) -> None:
        for what, number in (("slots", slots), ("capacity", capacity)):
            if number < 1:
                raise ModelError(f"Generator: {what} is {number}; at least 1")
        shapes = abstract(weights)
        cache, axes, position_axes, tree = _cache_of(init_cache, shapes, slots, capacity)
        ids = jax.ShapeDtypeStruct((slots,), jnp.int32)
        spec = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in cache]
        logits, after = _called("decode", decode, shapes, jax.tree.unflatten(tree, spec), ids, ids)
        _check_logits("decode", logits, slots)
        if [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] != [(leaf.shape, leaf.dtype) for leaf in spec]:
            raise ModelError("Generator: decode returns a cache of other shapes or dtypes than init_cache gives")

        def both(w: Any, tokens: Any, lengths: Any, *rest: Any) -> dict[str, Any]:
            *leaves, token, position = rest
            first, filled = prefill(w, tokens, lengths)
            following, later = decode(w, jax.tree.unflatten(tree, leaves), token, position)
            return {
                "prefill": {"logits": first, "cache": jax.tree.leaves(filled)},
                "decode": {"logits": following, "cache": jax.tree.leaves(later)},
                "start": {"cache": jax.tree.leaves(init_cache(w, 1, capacity))},
            }

        inputs = {
            "tokens": TensorSpec((1, "length"), "int32"),
            "lengths": TensorSpec((1,), "int32"),
            **{f"cache/{index}": TensorSpec(leaf.shape, leaf.dtype.name) for index, leaf in enumerate(cache)},
            "token": TensorSpec((slots,), "int32"),
            "position": TensorSpec((slots,), "int32"),
        }
        vocabulary = int(logits.shape[1])
        generation = Generation(
            slots=slots,
            capacity=capacity,
            vocabulary=vocabulary,
            cache=tuple(TensorSpec(leaf.shape, leaf.dtype.name) for leaf in cache),
            axes=axes,
            position_axes=position_axes,
            first_position=1 if encoder_decoder else None,
            end_tokens=tuple(_token(token, vocabulary) for token in end_tokens),
            tokenizer=tokenizer.encode() if isinstance(tokenizer, str) else tokenizer,
        )
        program = trace(both, weights, inputs)
        _check_prefill(program, generation)
        self.program: Program = program.replace(generation=generation)

    @classmethod
    def from_linen(cls, module: Any, variables: Mapping[str, Any], **options: Any) -> Generator:
        """Make a generator of a Flax Linen module that decodes a token at a time, with a collection `cache`.

        Args:
            module: takes `token[B, 1]` and gives `logits[B, 1, V]`; a parameter called `position` or `positions` gets
                `[B, 1]`. Its cache is made as Flax does: by `init` on tokens of the whole length.
            variables: all of its collections but the cache.
            **options: as of `Generator`.

        The prompt is read a token at a time too, in one compiled loop: functions of your own read it at once.

        >>> import flax.linen as nn
        >>> class Tiny(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, token):
        ...         x = nn.Embed(11, 8)(token)
        ...         return nn.Dense(11)(x + nn.MultiHeadDotProductAttention(2, decode=True)(x))
        >>> variables = Tiny().init(jax.random.key(0), jnp.ones((1, 1), "int32"))
        >>> lx.Generator.from_linen(Tiny(), variables, slots=2, capacity=8).program.generation.vocabulary
        11
        """
        steps, weights = linen_steps(module, variables)
        return cls(*steps, weights, **options)

    @classmethod
    def from_nnx(cls, module: Any, **options: Any) -> Generator:
        """Make a generator of a Flax NNX module that decodes a token at a time, with `nnx.Cache` variables.

        Args:
            module: takes and gives what `from_linen` says. Submodules with a method `init_cache`, such as
                `nnx.MultiHeadAttention`, make its cache.
            **options: as of `Generator`.

        >>> from flax import nnx
        >>> class Tiny(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.embed, self.out = nnx.Embed(11, 8, rngs=rngs), nnx.Linear(8, 11, rngs=rngs)
        ...         self.attention = nnx.MultiHeadAttention(2, 8, decode=True, rngs=rngs)
        ...     def __call__(self, token):
        ...         x = self.embed(token)
        ...         return self.out(x + self.attention(x))
        >>> lx.Generator.from_nnx(Tiny(nnx.Rngs(0)), slots=2, capacity=8).program.generation.vocabulary
        11
        """
        steps, weights = nnx_steps(module)
        return cls(*steps, weights, **options)


def _token(token: int, vocabulary: int) -> int:
    if not 0 <= token < vocabulary:
        raise ModelError(f"Generator: end token {token} is not one of the {vocabulary} tokens")
    return int(token)


def _called(name: str, fn: Callable[..., Any], *args: Any) -> Any:
    """Trace one of the functions, which must return a pair."""
    try:
        out = jax.eval_shape(fn, *args)
    except Exception as error:  # a user's function may raise anything
        raise ModelError(f"Generator: {name} cannot be traced: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(out, tuple) or len(out) != 2:
        raise ModelError(f"Generator: {name} returns a {type(out).__name__}, not (logits, cache)")
    return out


def _check_logits(name: str, logits: Any, rows: int) -> None:
    if getattr(logits, "ndim", 0) != 2 or logits.shape[0] != rows or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ModelError(f"Generator: the logits of {name} are {logits}; expected floats of shape ({rows}, tokens)")


type _CacheArrays = tuple[list[Any], tuple[int, ...], tuple[int | None, ...], Any]


def _cache_of(init_cache: InitCache, weights: Any, slots: int, capacity: int) -> _CacheArrays:
    """The arrays of the cache of all slots, the axes of the slots and of the positions in each, and their tree."""

    def shapes(sequences: int, positions: int = capacity) -> tuple[dict[str, Any], Any]:
        try:
            tree = jax.eval_shape(lambda w: init_cache(w, sequences, positions), weights)
        except Exception as error:  # a user's function may raise anything
            raise ModelError(
                f"Generator: init_cache cannot be traced: {type(error).__name__}: {first_line(error)}"
            ) from error
        return name_leaves(tree, single="cache"), jax.tree.structure(tree)

    (one, _), (two, _), (all_slots, tree) = shapes(1), shapes(2), shapes(slots)
    (longer, _) = shapes(1, capacity + 1)
    axes, places = list[int](), list[int | None]()
    for name, leaf in all_slots.items():
        differing = [axis for axis, (a, b) in enumerate(zip(one[name].shape, two[name].shape, strict=True)) if a != b]
        if len(differing) != 1:
            raise ModelError(
                f"Generator: {name!r} of the cache is {list(one[name].shape)} for one sequence and "
                f"{list(two[name].shape)} for two; each of its arrays needs one axis of sequences"
            )
        axes.append(differing[0])
        pairs = enumerate(zip(one[name].shape, longer[name].shape, strict=True))
        growing = [axis for axis, (a, b) in pairs if (a, b) == (capacity, capacity + 1)]
        places.append(growing[0] if len(growing) == 1 else None)
        if not leaf.size:
            raise ModelError(f"Generator: {name!r} of the cache has no elements")
    if not axes:
        raise ModelError("Generator: init_cache returns no array")
    return list(all_slots.values()), tuple(axes), tuple(places), tree


def _check_prefill(program: Program, generation: Generation) -> None:
    """Check that what a prefill gives fits the cache of a slot."""
    logits = program.outputs["prefill/logits"]
    if logits.shape != (1, generation.vocabulary):
        raise ModelError(f"Generator: prefill gives logits {logits}, decode gives {generation.vocabulary} tokens")
    names = [name for name in program.outputs if name.startswith("prefill/cache/")]
    if len(names) != len(generation.cache):
        raise ModelError(f"Generator: prefill gives {len(names)} arrays of cache, init_cache {len(generation.cache)}")
    for index, (whole, axis) in enumerate(zip(generation.cache, generation.axes, strict=True)):
        given = program.outputs[f"prefill/cache/{index}"]
        fits = len(given.shape) == len(whole.shape) and all(
            dim == 1 if at == axis else isinstance(dim, str) or dim <= size
            for at, (dim, size) in enumerate(zip(given.shape, whole.shape, strict=True))
            if isinstance(size, int)
        )
        if not fits or given.dtype != whole.dtype:
            raise ModelError(f"Generator: prefill gives {given} as array {index} of the cache; all slots have {whole}")
