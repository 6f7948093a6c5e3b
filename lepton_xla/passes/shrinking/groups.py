"""Groups: slices of weights that can only be removed together."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.environment.extras import Needs
from lepton_xla.errors import LeptonError, ModelError, RecipeError, UnsupportedError
from lepton_xla.passes.shrinking.dependencies import Study
from lepton_xla.passes.shrinking.dimensions import (
    Dimension,
    Kept,
    inner_size,
    leaves,
    mask_of,
    resolve,
    unit_sums,
    units_of,
)
from lepton_xla.program import Program, abstract_outputs, probe_sizes
from lepton_xla.trees import abstract, leaf_bytes

type Masks = dict[str, tuple[np.ndarray | None, ...]]
"""Weight path -> for each axis, which positions stay, bool `[*steps, size]`; None if all stay."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units (channels, hidden units, heads), each of which is one slice of every member.

    Attributes:
        name: the member that produces the units: `path[axis]`, or `path[axis.k]` for the k-th part of a flattened or
            concatenated axis, such as heads and the positions in them.
        kind: `channels` of a convolution, `heads` (batch dimensions of a product of two activations), or `units`.
        units: number of units.
        steps: lengths of the scans in which each step may lose different units; empty if all steps lose the same.
        cuts: path and axis (`1`, or `1.0` for a part of one) of every weight that has slices, in the weights' order.
        parameters: number of weight elements per unit, over all steps.
        unit_bytes: their bytes.
        inner: number of neighbouring positions of the members' axes per unit: the width of a head.
        protected: why no unit may be removed; empty if units may be removed.
        leaf: the dimension.
    """

    name: str
    kind: str
    units: int
    steps: tuple[int, ...]
    cuts: tuple[tuple[str, str], ...]
    parameters: int
    unit_bytes: int
    inner: int
    protected: str
    leaf: Dimension = dataclasses.field(repr=False)

    @property
    def members(self) -> tuple[str, ...]:
        """`path[axis]` of every weight that has slices."""
        return tuple(f"{path}[{axis}]" for path, axis in self.cuts)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the members' weights."""
        return tuple(dict.fromkeys(path for path, _ in self.cuts))

    def matches(self, pattern: str) -> bool:
        """Whether a regular expression matches the whole name of the group, of a member, or the path of a member."""
        return any(re.fullmatch(pattern, text) for text in (self.name, *self.members, *self.paths))

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        fields = [field.name for field in dataclasses.fields(self) if field.name not in ("leaf", "cuts")]
        return {name: getattr(self, name) for name in fields} | {
            "steps": list(self.steps),
            "members": list(self.members),
        }


def _protected(groups: Sequence[Group], reasons: Mapping[str, str]) -> tuple[Group, ...]:
    return tuple(
        dataclasses.replace(group, protected=group.protected or reasons.get(group.name, "")) for group in groups
    )


@dataclasses.dataclass(frozen=True)
class Groups:
    """All groups of a program, in the order in which their units are produced.

    Attributes:
        items: the groups.
        study: the analysis that found them.
    """

    items: tuple[Group, ...]
    study: Study = dataclasses.field(repr=False)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, name: str) -> Group:
        """The group with this name.

        Raises:
            KeyError: if there is none.
        """
        return next((group for group in self.items if group.name == name), None) or self._missing(name)

    def _missing(self, name: str) -> Group:
        raise KeyError(f"no group {name!r}; there are {', '.join(group.name for group in self.items)}")

    @property
    def removable(self) -> tuple[Group, ...]:
        """The groups that may lose units."""
        return tuple(group for group in self.items if not group.protected)

    def protecting(self, patterns: Sequence[str]) -> Groups:
        """Returns the groups with those protected that a pattern matches.

        Args:
            patterns: regular expressions, each of which must match the whole of a group's name, or of the path or
                `path[axis]` of one of its members.

        Raises:
            RecipeError: if a pattern is malformed, or matches neither a group nor a weight.
        """
        items = self.items
        for pattern in patterns:
            try:
                matched = {group.name for group in items if group.matches(pattern)}
            except (re.error, TypeError, OverflowError, RecursionError) as error:
                raise RecipeError(f"protect = {pattern!r} is not a regular expression: {error}") from error
            if not matched and not any(re.fullmatch(pattern, path) for path in self.study.weights):
                raise RecipeError(
                    f"protect = {pattern!r} matches none of the groups: {', '.join(group.name for group in items)}"
                )
            items = _protected(items, dict.fromkeys(matched, f"by the pattern {pattern!r}"))
        return dataclasses.replace(self, items=items)

    def without(self, reasons: Mapping[str, str]) -> Groups:
        """Returns the groups with those protected whose name is in `reasons`."""
        return dataclasses.replace(self, items=_protected(self.items, reasons))

    def to_json(self) -> list[dict[str, Any]]:
        """Plain dicts, lists and numbers."""
        return [group.to_json() for group in self.items]

    def __str__(self) -> str:
        rows = [("group", "kind", "units", "parameters", "bytes", "members")]
        for group in self.items:
            steps = "".join(f" x {length} steps" for length in group.steps)
            members = ", ".join(group.members) + (f"  ({group.protected})" if group.protected else "")
            sizes = (f"{group.units}{steps}", str(group.parameters), str(group.unit_bytes))
            rows.append((group.name, f"{group.kind}{' kept' if group.protected else ''}", *sizes, members))
        widths = [max(len(row[k]) for row in rows) for k in range(5)]
        cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=False)] for row in rows]
        lines = ["  ".join([*line, row[5]]).rstrip() for line, row in zip(cells, rows, strict=True)]
        return "\n".join([f"{len(self.items)} groups, {len(self.removable)} of which may lose units", *lines])

    def draw(self, path: str) -> None:
        """Draw which axes of which weights belong to which group: one row per weight, one column per group.

        Args:
            path: the file to write; its suffix selects the format (`.svg`, `.png`, `.pdf`).

        Raises:
            MissingPackageError: if matplotlib is not installed.
            LeptonError: if the file cannot be written.
        """
        with Needs("plot", "drawing"):
            figure = importlib.import_module("matplotlib.figure").Figure()
        rows = {name: k for k, name in enumerate(dict.fromkeys(path for group in self.items for path in group.paths))}
        figure.set_size_inches(4 + 0.3 * len(self.items), 3 + 0.22 * len(rows))
        axes = figure.add_subplot()
        for column, group in enumerate(self.items):
            marks = sorted({rows[name] for name in group.paths})
            color = "#b0b0b0" if group.protected else f"C{column % 10}"
            axes.plot([column, column], [marks[0], marks[-1]], color=color, linewidth=1)
            for owner, axis in group.cuts:
                axes.plot(column, rows[owner], "s", color=color, markersize=11)
                axes.text(column, rows[owner], axis, color="white", size=6, ha="center", va="center")
        labels = [f"{group.units} {group.kind}{' (kept)' if group.protected else ''}" for group in self.items]
        axes.set_xticks(range(len(self.items)), labels, rotation=90, size=7)
        axes.set_yticks(range(len(rows)), list(rows), size=7)
        axes.invert_yaxis()
        axes.set_title("axes of weights that lose units together", size=9)
        try:
            figure.savefig(path, bbox_inches="tight", dpi=150)
        except (OSError, ValueError) as error:
            raise LeptonError(f"{path} cannot be written: {error}") from error


@takes(program=Program, sizes=Mapping)
def find_groups(program: Program, *, sizes: Mapping[str, int] | None = None) -> Groups:
    """Find the channels, hidden units and heads of a program that can be removed, and their slices of weights.

    Args:
        program: a program whose weights are arrays.
        sizes: sizes of the symbolic dimensions at which to trace the program; chosen by default. Units that cannot be
            removed at larger sizes, such as positions that only longer inputs reach, are protected too.

    Raises:
        UnsupportedError: if a weight is quantized.

    >>> weights = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    >>> fn = lambda w, x: jax.nn.relu(x @ w["up"]) @ w["down"]
    >>> program = lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> [(group.name, group.units) for group in lx.passes.find_groups(program).removable]
    [('up[1]', 8)]
    """
    for path, weight in program.weights.items():
        if not hasattr(weight, "shape") or len(jax.tree.leaves(weight)) != 1:
            raise UnsupportedError(f"weight {path!r} is quantized; shrink a program before it is quantized")
    chosen = sizes if sizes is not None else probe_sizes(program.fn, program.weights, program.inputs)[0]
    study = _study(program, chosen)
    larger = _larger(program, chosen)
    made: dict[Dimension, tuple[str, bool]] = {}
    for product in study.products:
        for dimension in product.made:
            for leaf in leaves(dimension):
                made.setdefault(leaf, (product.path, product.convolution))
    cuts: dict[Dimension, list[tuple[str, str]]] = {leaf: [] for leaf in made}
    for path, axes in study.weights.items():
        for axis, dimension in enumerate(axes):
            parts = leaves(dimension)
            for k, leaf in enumerate(parts):
                cuts.setdefault(leaf, []).append((path, f"{axis}" if len(parts) == 1 else f"{axis}.{k}"))
    heads = {leaf for dimension in study.batched for leaf in leaves(dimension)}
    groups: list[Group] = []
    for leaf, named in cuts.items():
        # Skip leaves that nothing reads or that have no units, and protected ones that no product makes, such as a
        # window or a vocabulary.
        if not named or leaf.size == 0 or leaf.scans is None or (leaf.reason and leaf not in made):
            continue
        path, convolution = made.get(leaf, (named[0][0], False))
        kind = "heads" if leaf in heads else "channels" if convolution else "units"
        owner, axis = next((cut for cut in named if cut[0] == path), named[0])
        owners = dict.fromkeys(owner for owner, _ in named)
        elements = {owner: _per_unit(study.weights[owner], leaf) for owner in owners}
        steps = program.weights[named[0][0]].shape[: len(leaf.scans)]
        reason = leaf.reason
        if not reason and larger is not None:
            reason = _needed(larger, study, leaf, steps)
        groups.append(
            Group(
                f"{owner}[{axis}]",
                kind,
                leaf.size,
                steps,
                tuple(named),
                sum(elements.values()),
                sum(leaf_bytes((count,), program.weights[owner].dtype) for owner, count in elements.items()),
                math.gcd(*(inner_size(d, leaf) for owner in owners for d in study.weights[owner])),
                reason,
                leaf,
            )
        )
    return Groups((*groups, *_tied(program, study)), study)


def _tied(program: Program, study: Study) -> list[Group]:
    """Protected groups for axes whose positions all depend on each other, as after `x + jnp.roll(x, 1, -1)`."""
    whole: dict[Dimension, tuple[str, bool]] = {}
    for product in study.products:
        for dimension in map(resolve, product.made):
            if not leaves(dimension) and dimension.size > 1:
                whole.setdefault(dimension, (product.path, product.convolution))
    groups: list[Group] = []
    for dimension, (path, convolution) in whole.items():
        cuts = [
            (owner, f"{axis}")
            for owner, axes in study.weights.items()
            for axis, d in enumerate(axes)
            if d.found() is dimension
        ]
        counts = {owner: math.prod(program.weights[owner].shape) // dimension.size for owner, _ in cuts}
        unit_bytes = sum(leaf_bytes((count,), program.weights[owner].dtype) for owner, count in counts.items())
        name = next((f"{owner}[{axis}]" for owner, axis in cuts if owner == path), path)
        kind = "channels" if convolution else "units"
        reason = "its positions are tied to one another, so that none can go without all others"
        groups.append(
            Group(name, kind, dimension.size, (), tuple(cuts), sum(counts.values()), unit_bytes, 1, reason, dimension)
        )
    return groups


def _per_unit(axes: Sequence[Dimension], leaf: Dimension) -> int:
    """Number of elements of a weight per unit."""
    whole, rest = 1, 1
    for dimension in axes:
        whole *= dimension.size
        rest *= dimension.size - int(np.count_nonzero(units_of(dimension, leaf) == 0))
    return whole - rest


def _study(program: Program, sizes: Mapping[str, int]) -> Study:
    closed = jax.make_jaxpr(program.fn)(abstract(program.weights), *program.abstract_inputs(sizes))
    return Study(closed, program.weights, list(program.inputs))


def _larger(program: Program, sizes: Mapping[str, int]) -> Study | None:
    """Repeat the study with symbolic dimensions one larger or, if that fails, twice as large."""
    for more in ({name: size + 1 for name, size in sizes.items()}, {name: 2 * size for name, size in sizes.items()}):
        if more != sizes:
            try:
                abstract_outputs(program.fn, program.weights, program.inputs, more)
            except ModelError:
                continue
            return _study(program, more)
    return None


def _needed(larger: Study, study: Study, leaf: Dimension, steps: tuple[int, ...]) -> str:
    """Why a leaf cannot lose units at larger sizes; empty if it can."""
    first = np.arange(leaf.size) == 0
    for stays in (first, ~first):  # every unit is removed in one of the two, and never all of them
        if stays.any():
            masks = masks_of(study, {leaf: np.broadcast_to(stays, (*steps, leaf.size))})
            refusal = transferred(larger, masks)[1]
            if refusal:
                return f"at larger sizes of the inputs, {refusal}"
    return ""


def masks_of(study: Study, kept: Kept) -> Masks:
    """Masks of the weights for the units that stay."""
    masks: Masks = {}
    for path, axes in study.weights.items():
        cut = tuple(mask_of(dimension, kept) if loses(dimension, kept) else None for dimension in axes)
        if any(mask is not None for mask in cut):
            masks[path] = cut
    return masks


def loses(dimension: Dimension, kept: Kept) -> bool:
    """Whether a dimension loses units."""
    return any(leaf in kept for leaf in leaves(dimension))


def transferred(study: Study, masks: Masks, known: Container[str] | None = None) -> tuple[Kept, str]:
    """Transfer masks of weights to the leaves of another study, at other sizes of the inputs or of another function.

    Args:
        study: the other study.
        masks: masks of the weights that lose something.
        known: paths of the weights that may lose only what `masks` says; default: all. Others lose what goes with it.

    Returns:
        Which units of the leaves stay; and a refusal, if something cannot be removed there, else an empty text.
    """
    kept: dict[Dimension, np.ndarray] = {}
    for path, cut in masks.items():
        for dimension, mask in zip(study.weights[path], cut, strict=True):
            for leaf in leaves(dimension) if mask is not None else ():
                assert mask is not None
                stays = unit_sums(mask, units_of(dimension, leaf), leaf.size) > 0
                if not stays.all():
                    kept[leaf] = stays if len(leaf.scans or ()) else stays.reshape(-1, leaf.size)[0]
    for path, axes in study.weights.items():
        if known is not None and path not in known:
            continue
        cut = masks.get(path, (None,) * len(axes))
        for axis, (dimension, mask) in enumerate(zip(axes, cut, strict=True)):
            whole = np.ones(dimension.size, bool) if mask is None else mask
            blocked = next((leaf.reason for leaf in leaves(dimension) if leaf in kept and leaf.reason), "")
            if blocked or np.any(mask_of(dimension, kept) != whole):
                return kept, f"{path}[{axis}] cannot lose what was removed: {blocked or 'it is tied to other units'}"
    return kept, ""
