"""Casts products to bfloat16 or float16: their weights are stored in it, and they are computed on it.

Only products are cast; they accumulate in float32 and return their original dtype. So everything between them keeps its
dtype: norms and their statistics, softmax, sums, residual streams, loop carries, inputs and outputs. XLA fuses the
conversions into the surrounding operations.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.arguments import takes
from lepton_xla.derivations import Step
from lepton_xla.errors import RecipeError
from lepton_xla.passes.core.precomputation import precompute
from lepton_xla.passes.core.sites import Site, find_sites, operand_value, rewrite_sites
from lepton_xla.passes.core.walker import Context, Values
from lepton_xla.program import Expansion, Program, probe_sizes
from lepton_xla.report import PassReport, SiteReport, unchanged
from lepton_xla.trees import abstract, tree_bytes

DTYPES = ("bfloat16", "float16")


@takes(program=Program)
def cast(
    program: Program,
    dtype: str = "bfloat16",
    *,
    keep: Iterable[str] = (),
    on_unsupported: Literal["error", "keep"] = "error",
) -> Program:
    """Compute products on 16-bit floats, and store their weights in that type.

    A weight is stored in 16 bits if it is used only in products and embedding lookups that are all cast; other weights
    (a bias, the scale of a norm) are unchanged. Products of two activations, such as attention's, are cast too. A cast
    product loses its requested precision (`jax.default_matmul_precision`). Integer products and products of 16-bit
    floats are unchanged. A quantized weight keeps its codes; if it is multiplied in float, it is unpacked to 16 bits,
    on each call or on loading.

    Args:
        program: any program.
        dtype: `bfloat16`, with float32's range, or `float16`, with three more bits of precision but a largest value of
            65504: larger activations become infinite.
        keep: regular expressions; sites whose whole name matches one are not cast.
        on_unsupported: what to do about a product inside an unknown container: raise an `error`, or `keep` it
            unchanged.

    Returns:
        The program; its history reports each weight, and each product without one. Inputs and outputs keep their
        dtypes.

    Raises:
        RecipeError: if the dtype is another, or a pattern is malformed or matches no site.
        UnsupportedError: if a product cannot be reached, unless `on_unsupported` is `keep`.

    References:
        Micikevicius et al., Mixed precision training, 2018, arXiv:1710.03740. Kalamkar et al., A study of bfloat16 for
        deep learning training, 2019, arXiv:1905.12322.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> narrow = lx.passes.cast(program, "bfloat16")
    >>> narrow.weights["w"].dtype.name, narrow.outputs["output"].dtype
    ('bfloat16', 'float32')
    """
    start = time.perf_counter()
    if dtype not in DTYPES:
        raise RecipeError(f"cast: dtype {dtype!r} is none of {', '.join(DTYPES)}")
    program = precompute(program)  # otherwise the cast would also change weights that are computed from a cast one
    keep, sites = tuple(keep), find_sites(program)
    reasons = _kept_sites(sites, keep)
    weight_reasons = _kept_weights(program, sites, reasons, dtype)
    like = abstract(program.weights)
    weights = {
        path: leaf if weight_reasons[path] else jnp.asarray(leaf).astype(dtype)
        for path, leaf in program.weights.items()
    }

    def rule(site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
        # A site may exist at some sizes only, and not be among those found.
        if reasons.get(site.name, _untouched(site)):
            return None
        operands = [operand_value(value) for value in values]
        if site.kind == "gather":
            return [out.astype(site.output.dtype) for out in context.bind(eqn, operands)]
        # Further operands of a product, such as the group sizes of a ragged one, are integers.
        narrow = [_narrowed(operand, dtype) for operand in operands]
        (out,) = _compat.bind(eqn, narrow, preferred_element_type=jnp.dtype("float32"), precision=None)
        return [out.astype(site.output.dtype)]

    fn = rewrite_sites(program.fn, rule, inline=True, on_unknown=on_unsupported, like=like)
    # Trace once, so that unreachable products are reported now and not when the program runs.
    sizes, _ = probe_sizes(program.fn, program.weights, program.inputs)
    jax.eval_shape(fn, abstract(weights), *program.abstract_inputs(sizes))
    reports = [
        _report(path, dtype, reason, tree_bytes(program.weights[path]), tree_bytes(weights[path]))
        for path, reason in weight_reasons.items()
    ]
    reports += [_report(site.name, f"{dtype} product", reasons[site.name]) for site in sites if site.path is None]
    metrics = {"weights_bytes_before": program.weights_bytes, "weights_bytes_after": tree_bytes(weights)}
    report = PassReport("cast", time.perf_counter() - start, tuple(reports), metrics)
    history = (*program.history, report)
    expansion = _cast_expansion(program, dtype, keep, on_unsupported)
    steps = [
        Step("cast", (path,), (path,), lambda leaf: (leaf.astype(dtype),))
        for path, reason in weight_reasons.items()
        if not reason
    ]
    derivation = program.derived(*steps)
    return program.replace(fn=fn, weights=weights, history=history, expansion=expansion, derivation=derivation)


def _report(name: str, action: str, reason: str, before: int = 0, after: int = 0) -> SiteReport:
    if reason:
        return unchanged(name, reason, bytes_before=before, bytes_after=after)
    return SiteReport(name, action, "", before, after)


def _cast_expansion(
    program: Program, dtype: str, keep: Sequence[str], on_unsupported: Literal["error", "keep"]
) -> Expansion | None:
    """Cast the expansion: weights that are unpacked on loading are cast there."""
    if program.expansion is None:
        return None
    expand = program.expansion.expand
    expanded = program.replace(fn=program.expansion.fn, weights=expand(program.weights))
    # A weight that is unpacked on each call has a site of another name than one that is unpacked before.
    names = [site.name for site in find_sites(expanded)]
    there = [text for text in keep if any(re.fullmatch(text, name) for name in names)]
    narrow = cast(expanded, dtype, keep=there, on_unsupported=on_unsupported)
    like = abstract(narrow.weights)
    return Expansion(
        lambda weights: jax.tree.map(lambda leaf, at: leaf.astype(at.dtype), expand(weights), like), narrow.fn
    )


def _narrowed(operand: Any, dtype: str) -> Any:
    return operand.astype(dtype) if jnp.issubdtype(operand.dtype, jnp.floating) else operand


def _is_wide(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize > 2


def _untouched(site: Site) -> str:
    """Why a site needs no cast; empty if it does."""
    operands = site.operands[:1] if site.kind == "gather" else site.operands
    for operand in operands:
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            return f"it is computed in {operand.dtype}"
    if not any(_is_wide(operand.dtype) for operand in operands):
        return f"it is computed in {operands[0].dtype} already"
    return ""


def _kept_sites(sites: Sequence[Site], keep: Sequence[str]) -> dict[str, str]:
    """For each site, why it is not cast; empty if it is.

    Raises:
        RecipeError: if a pattern is malformed or matches no site.
    """
    patterns: list[re.Pattern[str]] = []
    for text in keep:
        try:
            patterns.append(re.compile(text))
        except (re.error, OverflowError, RecursionError) as error:
            raise RecipeError(f"cast: keep {text!r} is not a regular expression: {error}") from error
        if not any(patterns[-1].fullmatch(site.name) for site in sites):
            names = ", ".join(site.name for site in sites[:6]) or "there is none"
            raise RecipeError(f"cast: keep {text!r} matches none of the program's {len(sites)} sites: {names}")
    return {
        site.name: "named in keep" if any(at.fullmatch(site.name) for at in patterns) else _untouched(site)
        for site in sites
    }


def _kept_weights(program: Program, sites: Sequence[Site], reasons: Mapping[str, str], dtype: str) -> dict[str, str]:
    """For each weight, why its stored dtype is unchanged; empty if it is cast."""
    users: dict[str, list[Site]] = {}
    for site in sites:
        if site.path is not None:
            users.setdefault(site.path, []).append(site)
    return {path: _kept_weight(leaf, users.get(path, []), reasons, dtype) for path, leaf in program.weights.items()}


def _kept_weight(leaf: Any, users: Sequence[Site], reasons: Mapping[str, str], dtype: str) -> str:
    if not isinstance(leaf, jax.Array):
        return "it is quantized"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"it is {leaf.dtype}"
    if not _is_wide(leaf.dtype):
        return f"it is {leaf.dtype} already"
    if not users:
        return "no product takes it"
    if not all(site.exclusive for site in users):
        return "it is also used where no product is"
    for site in users:
        if site.not_float:
            return f"it becomes {site.not_float} before site {site.name!r}"
        if reasons[site.name]:
            return f"site {site.name!r} stays as it is: {reasons[site.name]}"
    largest = float(jnp.max(jnp.abs(leaf), initial=0))
    if largest > float(jnp.finfo(dtype).max):
        return f"its largest magnitude, {largest:.4g}, is more than {dtype} holds"
    return ""
