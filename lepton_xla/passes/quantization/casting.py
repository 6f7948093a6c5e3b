"""Products in bfloat16 or float16: the weights of products stored in it, the products computed on it.

Only products are narrowed, and they accumulate in float32 and give what they gave before. So everything between them
keeps its dtype: norms and their statistics, softmax, sums, residual streams, the carries of loops; inputs and outputs
are as declared. XLA fuses the conversions into what surrounds them.
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
from lepton_xla.errors import RecipeError
from lepton_xla.passes.core.precomputation import precompute
from lepton_xla.passes.core.sites import Site, find_sites, operand_value, rewrite_sites
from lepton_xla.passes.core.walker import Context, Values
from lepton_xla.program import Expansion, Program, probe_sizes
from lepton_xla.report import PassReport, SiteReport
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
    """Compute products on 16-bit floats, and store the weights of products so.

    A weight is stored narrow if it goes into products and embedding lookups only, all of which are narrowed; any other
    (a bias, the scale of a norm) stays as it is. Products of two activations, such as attention's, are narrowed too. A
    precision that a narrowed product asked for (`jax.default_matmul_precision`) is dropped. Integer products, and those
    of 16-bit floats, are left alone. A quantized weight keeps its codes; where it is multiplied in float, it is narrow
    once it is unpacked, on each call or on loading.

    Args:
        program: any program.
        dtype: `bfloat16`, with float32's range, or `float16`, with three bits more of precision, whose largest value is
            65504: activations beyond it become infinite.
        keep: regular expressions; sites whose whole name one matches stay as they are.
        on_unsupported: what to do about a product inside a container that cannot be looked into: `keep` leaves it.

    Returns:
        The program; its history says of each weight, and each product without one, what it became and why. Inputs and
        outputs have the dtypes they had.

    Raises:
        RecipeError: for another dtype, or a pattern that is none or matches no site.
        UnsupportedError: for a product that cannot be reached, unless `on_unsupported` says to keep it.

    References:
        Micikevicius et al., Mixed precision training, 2018, arXiv:1710.03740.
        Kalamkar et al., A study of bfloat16 for deep learning training, 2019, arXiv:1905.12322.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> narrow = lx.passes.cast(program, "bfloat16")
    >>> narrow.weights["w"].dtype.name, narrow.outputs["output"].dtype
    ('bfloat16', 'float32')
    """
    start = time.perf_counter()
    if dtype not in DTYPES:
        raise RecipeError(f"cast: dtype {dtype!r} is none of {', '.join(DTYPES)}")
    program = precompute(program)  # else a weight that others are computed from would change for them too
    keep, sites = tuple(keep), find_sites(program)
    reasons = _kept_sites(sites, keep)
    weight_reasons = _kept_weights(program, sites, reasons, dtype)
    like = abstract(program.weights)
    weights = {
        path: leaf if weight_reasons[path] else jnp.asarray(leaf).astype(dtype)
        for path, leaf in program.weights.items()
    }

    def rule(site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
        # A site may be there at some sizes only, and so not among those found.
        if reasons.get(site.name, _untouched(site)):
            return None
        operands = [operand_value(value) for value in values]
        if site.kind == "gather":
            return [out.astype(site.output.dtype) for out in context.bind(eqn, operands)]
        # Further operands of a product, such as the sizes of the groups of a ragged one, are integers.
        narrow = [_narrowed(operand, dtype) for operand in operands]
        (out,) = _compat.bind(eqn, narrow, preferred_element_type=jnp.dtype("float32"), precision=None)
        return [out.astype(site.output.dtype)]

    fn = rewrite_sites(program.fn, rule, inline=True, on_unknown=on_unsupported, like=like)
    # What cannot be reached is said now, not when the program runs.
    sizes, _ = probe_sizes(program.fn, program.weights, program.inputs)
    jax.eval_shape(fn, abstract(weights), *program.abstract_inputs(sizes))
    reports = [
        SiteReport(
            path,
            "kept" if reason else dtype,
            reason,
            tree_bytes(program.weights[path]),
            tree_bytes(weights[path]),
        )
        for path, reason in weight_reasons.items()
    ]
    reports += [
        SiteReport(site.name, "kept" if reasons[site.name] else f"{dtype} product", reasons[site.name])
        for site in sites
        if site.path is None
    ]
    metrics = {"weights_bytes_before": program.weights_bytes, "weights_bytes_after": tree_bytes(weights)}
    report = PassReport("cast", time.perf_counter() - start, tuple(reports), metrics)
    history = (*program.history, report)
    expansion = _cast_expansion(program, dtype, keep, on_unsupported)
    return program.replace(fn=fn, weights=weights, history=history, expansion=expansion)


def _cast_expansion(
    program: Program, dtype: str, keep: Sequence[str], on_unsupported: Literal["error", "keep"]
) -> Expansion | None:
    """What runs on weights that are unpacked on loading: they are narrowed there."""
    if program.expansion is None:
        return None
    expand = program.expansion.expand
    expanded = program.replace(fn=program.expansion.fn, weights=expand(program.weights))
    # A weight that is unpacked on each call has another site, of another name, than one that is unpacked before.
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
    """Why a site has nothing to narrow; empty where it has."""
    operands = site.operands[:1] if site.kind == "gather" else site.operands
    for operand in operands:
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            return f"it is computed in {operand.dtype}"
    if not any(_is_wide(operand.dtype) for operand in operands):
        return f"it is computed in {operands[0].dtype} already"
    return ""


def _kept_sites(sites: Sequence[Site], keep: Sequence[str]) -> dict[str, str]:
    """By site, why it stays as it is; empty where it is narrowed.

    Raises:
        RecipeError: for a pattern that is none or matches no site.
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
    """By weight, why it is stored as it was; empty where it is stored narrow."""
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
