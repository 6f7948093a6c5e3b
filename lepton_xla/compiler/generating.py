"""Parts the program of a `Generator`: the ordinary model, which gives next-token logits, and the steps of generation.

All take the same weights. What a part does not need of the whole program is dead code, which XLA removes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.compiler.buckets import BucketSizes, bucket_name, combinations
from lepton_xla.compiler.cache_codes import CacheFormat
from lepton_xla.compiler.code import Code
from lepton_xla.compiler.flattening import compile_flat, flat_functions
from lepton_xla.compiler.manifest import DECODE, GenerationEntry, Tensor, prefill_name
from lepton_xla.compiler.portable import export_programs
from lepton_xla.compiler.stepping import CompiledSteps, Stepper, decode_specs, donation, prefill_specs
from lepton_xla.errors import CompileError
from lepton_xla.program import Expansion, Generation, Program
from lepton_xla.trees import name_leaves

type _Fn = Callable[..., Any]
# Up to this tolerance, both steps compute a token alike.
_EXACT = 1e-3


@dataclasses.dataclass(frozen=True)
class Parts:
    """The programs of a generator.

    Attributes:
        model: prompts to logits of the next token, an ordinary model.
        prefill: a prompt into a slot of the cache.
        decode: one token for each slot.
    """

    model: Program
    prefill: Program
    decode: Program


def part(program: Program, length: int) -> Parts:
    """Part the program of a generator.

    Args:
        program: the program.
        length: a length of prompts at which it can be traced.

    Raises:
        CompileError: if it is not what `Generator` made, because a pass changed its inputs.
    """
    generation = program.generation
    assert generation is not None
    if list(program.inputs) != ["tokens", "lengths", *_cache_names(generation), "token", "position"]:
        raise CompileError(f"the program of a generator takes {', '.join(program.inputs)}, not what its steps need")
    inputs, outputs = program.inputs, program.outputs
    logits, following = outputs["prefill/logits"], outputs["decode/logits"]
    stored = CacheFormat(generation).specs
    cache = {f"cache/{index}": spec for index, spec in enumerate(stored)}
    model_inputs = {name: inputs[name] for name in ("tokens", "lengths")}
    model = _changed(program, _model(generation), model_inputs, {"logits": logits})
    prefill = _changed(program, _prefill(generation), prefill_specs(stored), {"logits": logits, **cache})
    specs = decode_specs(generation.slots, stored)
    decode = _changed(program, _decode(generation, length), specs, {"logits": following, **cache})
    return Parts(model, prefill, decode)


def compile_steps(
    parts: Parts, generation: Generation, arrays: Sequence[jax.Array], bucket_sizes: BucketSizes
) -> tuple[CompiledSteps, dict[str, Code]]:
    """Compile both steps.

    Args:
        parts: the programs.
        generation: what is known of them.
        arrays: the weights that they take, unpacked.
        bucket_sizes: the lengths of prompts.

    Raises:
        CompileError: if XLA refuses one.
    """
    codes: dict[str, Code] = {}
    _, flat = flat_functions(parts.prefill)
    for sizes in combinations(bucket_sizes):
        name = prefill_name(bucket_name(sizes))
        shapes = parts.prefill.abstract_inputs(sizes)
        codes[name] = compile_flat(flat, arrays, shapes, name, donation(arrays, 3, shapes))
    _, flat = flat_functions(parts.decode)
    shapes = parts.decode.abstract_inputs({})
    codes[DECODE] = compile_flat(flat, arrays, shapes, DECODE, donation(arrays, 2, shapes))
    leaves = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    return export_steps(parts, generation, leaves, bucket_sizes), codes


def export_steps(
    parts: Parts, generation: Generation, weights: Sequence[jax.ShapeDtypeStruct], bucket_sizes: BucketSizes
) -> CompiledSteps:
    """The portable programs of both steps, for weights of these shapes.

    Raises:
        CompileError: if one cannot be exported.
    """
    _, flat = flat_functions(parts.prefill)
    prefill, _ = export_programs(flat, weights, parts.prefill.inputs, bucket_sizes)
    _, flat = flat_functions(parts.decode)
    decode, _ = export_programs(flat, weights, parts.decode.inputs, {})
    return CompiledSteps(tuple(prefill), tuple(decode), generation.tokenizer)


def check_generation(program: Program, bucket_sizes: BucketSizes, *, one_device: bool) -> None:
    """Check what must hold before a generator is compiled.

    Raises:
        CompileError: if prompts may be longer than the cache, or it is to be compiled for several devices.
    """
    generation = program.generation
    assert generation is not None
    if not one_device:
        raise CompileError("a model that generates is compiled for one device: give neither mesh nor topology")
    longest = bucket_sizes["length"][-1]
    if longest > generation.capacity:
        raise CompileError(f"buckets['length'] goes to {longest}; the cache has {generation.capacity} positions")


def check_steps(stepper: Stepper, tolerance: float, *, rounds: bool = False) -> None:
    """Check, by running them, that slots do not affect each other, and that both steps mean the same positions.

    Args:
        stepper: the compiled steps.
        tolerance: largest difference of logits, relative to the largest.
        rounds: whether the cache is rounded, so that reading a token by one step or the other differs.

    Raises:
        CompileError: if they do; says which function is at fault.
    """
    random = np.random.default_rng(0)
    size = min(4, stepper.longest_prompt, stepper.capacity - 1)
    if size < 1:
        return
    prompts = random.integers(min(1, stepper.vocabulary - 1), stepper.vocabulary, (stepper.slots, size)).tolist()
    first = stepper.first_position
    place = size if first is None else first

    def decoded(slot: int, others: int) -> np.ndarray:
        tokens, positions = [others] * stepper.slots, [place if others else 0] * stepper.slots
        tokens[slot], positions[slot] = prompts[0][0], place
        return stepper.decode(tokens, positions)[slot]

    logits = stepper.prefill(prompts[0], 0)
    alone = decoded(0, others=0)
    stepper.reset()
    for slot, prompt in enumerate(prompts[1:]):
        stepper.prefill(prompt, slot)
    stepper.prefill(prompts[0], stepper.slots - 1)
    beside = decoded(stepper.slots - 1, others=prompts[0][-1])
    stepper.reset()
    if _differs(beside, alone, tolerance):
        raise CompileError(
            "the sequences of different slots affect each other: decode must treat the rows of the cache, of token and "
            "of position separately"
        )
    if first is None and size > 1 and tolerance <= _EXACT and not rounds:
        stepper.prefill(prompts[0][:-1], 0)
        tokens, positions = [0] * stepper.slots, [0] * stepper.slots
        tokens[0], positions[0] = prompts[0][-1], size - 1
        stepwise = stepper.decode(tokens, positions)[0]
        stepper.reset()
        if _differs(stepwise, logits, tolerance):
            raise CompileError(
                "decode does not go on where prefill stops: reading the last token of a prompt by decode, at position "
                "length - 1, gives other logits than reading it by prefill"
            )


def _differs(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if (np.isfinite(found) != finite).any():
        return True
    scale = np.abs(expected[finite]).max(initial=0.0)
    return bool(np.abs(found[finite] - expected[finite]).max(initial=0.0) > tolerance * scale)


def entry_of(generation: Generation) -> GenerationEntry:
    """What the manifest says of it, before files are written."""
    form = CacheFormat(generation)
    return GenerationEntry(
        axes=form.axes,
        slots=generation.slots,
        capacity=generation.capacity,
        vocabulary=generation.vocabulary,
        first_position=generation.first_position,
        end_tokens=generation.end_tokens,
        cache=tuple(
            Tensor(name=f"cache/{index}", shape=spec.shape, dtype=spec.dtype) for index, spec in enumerate(form.specs)
        ),
    )


def _cache_names(generation: Generation) -> list[str]:
    return [f"cache/{index}" for index in range(len(generation.cache))]


def _changed(
    program: Program, make: Callable[[_Fn], _Fn], inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> Program:
    expansion = program.expansion
    if expansion is not None:
        expansion = Expansion(expansion.expand, make(expansion.fn))
    return program.replace(
        fn=make(program.fn), expansion=expansion, inputs=dict(inputs), outputs=dict(outputs), generation=None
    )


def _zeros(generation: Generation) -> tuple[list[jax.Array], jax.Array]:
    """Inputs that a part does not need: the cache, and one integer for each slot."""
    cache = [jnp.zeros(spec.at({}).shape, spec.dtype) for spec in generation.cache]
    return cache, jnp.zeros(generation.slots, jnp.int32)


def _model(generation: Generation) -> Callable[[_Fn], _Fn]:
    def make(fn: _Fn) -> _Fn:
        def model(w: Any, tokens: Any, lengths: Any) -> dict[str, Any]:
            cache, none = _zeros(generation)
            return {"logits": name_leaves(fn(w, tokens, lengths, *cache, none, none))["prefill/logits"]}

        return model

    return make


def _prefill(generation: Generation) -> Callable[[_Fn], _Fn]:
    def make(fn: _Fn) -> _Fn:
        def prefill(w: Any, tokens: Any, lengths: Any, slot: Any, *cache: Any) -> dict[str, Any]:
            unused, none = _zeros(generation)
            out = name_leaves(fn(w, tokens, lengths, *unused, none, none))
            zero, rows = jnp.zeros((), jnp.int32), list[Any]()
            for name in _cache_names(generation):
                # The whole slot is written, so nothing of the sequence before is left.
                empty, filled = out[f"start/{name}"], out[f"prefill/{name}"]
                rows.append(jax.lax.dynamic_update_slice(empty, filled.astype(empty.dtype), [zero] * empty.ndim))
            form, after = CacheFormat(generation), dict[str, Any]()
            for index, (leaf, row, axis) in enumerate(zip(cache, form.fill(rows), form.axes, strict=True)):
                starts = [slot if at == axis else zero for at in range(leaf.ndim)]
                after[f"cache/{index}"] = jax.lax.dynamic_update_slice(leaf, row.astype(leaf.dtype), starts)
            return {"logits": out["prefill/logits"], **after}

        return prefill

    return make


def _decode(generation: Generation, length: int) -> Callable[[_Fn], _Fn]:
    def make(fn: _Fn) -> _Fn:
        updated = _updated_once(fn)

        def decode(w: Any, token: Any, position: Any, *cache: Any) -> dict[str, Any]:
            prompt, lengths = jnp.zeros((1, length), jnp.int32), jnp.ones(1, jnp.int32)
            form = CacheFormat(generation)
            out = name_leaves(updated(w, prompt, lengths, *form.read(cache), token, position))
            after = form.write(cache, [out[f"decode/{name}"] for name in _cache_names(generation)], position)
            return {"logits": out["decode/logits"], **{f"cache/{index}": leaf for index, leaf in enumerate(after)}}

        return decode

    return make


def _updated_once(fn: _Fn) -> _Fn:
    """The same function, in which what an update makes is one array for all that read it.

    XLA merges the update of a cache into each of its readers, each of which then needs a copy of the whole cache.
    """
    from lepton_xla.passes.core.rewriting import rewrite  # here, because serving must not import a pass

    def update(context: Any, eqn: Any, values: list[Any]) -> list[Any] | None:
        if context.uses[eqn.outvars[0]] < 2:
            return None
        return list(jax.lax.optimization_barrier(context.bind(eqn, values)))

    return rewrite(fn, {"scatter": update, "dynamic_update_slice": update}, inline=True, on_unknown="keep")
