"""`Rules`: how to find the partition spec of each weight of a model."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lepton_xla import toml
from lepton_xla.arguments import takes
from lepton_xla.errors import ShardingError, first_line
from lepton_xla.program import Program
from lepton_xla.sharding.decisions import Leaf, by_names, by_size
from lepton_xla.sharding.meshes import AnyMesh
from lepton_xla.sharding.placement import Placement, entry_of, placed
from lepton_xla.sharding.specs import Part, as_spec, axes_of, check_axes, check_spec
from lepton_xla.trees import some_names, tree_bytes

# A mesh without this axis does not split batches, unless other axes are asked for.
_BATCH = ("data",)


@dataclasses.dataclass(frozen=True)
class Rules:
    """How to cut the weights of a model over a mesh, and its batches.

    For each weight, the first of these that applies decides: a rule whose pattern matches the weight's path; the
    logical names of its axes (from Flax metadata), of which at least one cuts it; the fallback. Otherwise the weight is
    whole on every device.

    Attributes:
        rules: pairs of a regular expression, which must match the whole path, and a spec: one entry for each axis of
            the weight, each a mesh axis, several, or None. Axes without an entry are not cut. First match wins.
        logical: what cuts a logical axis: `{"mlp": "model", "embed": None}`. A logical name that is missing here, but
            is a mesh axis, stands for itself; any other is not cut.
        fallback: mesh axes that cut the largest divisible axis of each remaining weight (FSDP); empty for none.
        fallback_bytes: weights of fewer bytes stay whole: gathering them costs more time than they take memory.
        batch: mesh axes that split the rows of a batch. The default, `data`, may be missing from the mesh.

    Raises:
        ShardingError: for a pattern that is not a regular expression, or values of other types.

    >>> rules = lx.sharding.Rules([(".*/up", (None, "model")), (".*/down", ("model",))], fallback="data")
    >>> mesh = lx.sharding.mesh("data=1,model=1", jax.devices()[:1])
    >>> weights = {"a/up": jnp.ones((4, 8)), "a/down": jnp.ones((8, 4)), "bias": jnp.ones(4)}
    >>> for entry in rules.resolve(weights, mesh).entries:
    ...     print(entry.path, entry.spec, entry.reason)
    a/up P(None, 'model') rule '.*/up'
    a/down P('model',) rule '.*/down'
    bias P() 16 B; the fallback begins at 1.05 MB
    """

    rules: Sequence[tuple[str, Iterable[Part] | PartitionSpec]] = ()
    logical: Mapping[str, Part] = dataclasses.field(default_factory=dict[str, Part])
    fallback: Part = ()
    fallback_bytes: int = 1 << 20
    batch: Part = _BATCH

    def __post_init__(self) -> None:
        rules: list[tuple[str, PartitionSpec]] = []
        for number, rule in enumerate(self.rules):
            try:
                pattern, spec = rule
                re.compile(pattern)
                rules.append((pattern, as_spec([spec] if isinstance(spec, str) else spec)))
            except (re.error, OverflowError, RecursionError, TypeError, ValueError) as error:
                raise ShardingError(
                    f"rules[{number}] = {rule!r} is not a regular expression and a spec: {error}"
                ) from error
        object.__setattr__(self, "rules", tuple(rules))
        if not isinstance(self.fallback_bytes, int):
            raise ShardingError(f"fallback_bytes = {self.fallback_bytes!r} is not a number of bytes")
        for name in ("logical", "fallback", "batch"):
            value: Any = getattr(self, name)
            try:
                plain = {key: axes_of(part) for key, part in value.items()} if name == "logical" else axes_of(value)
            except (TypeError, AttributeError) as error:
                wanted = "a mapping of names to mesh axes" if name == "logical" else "a mesh axis, or several"
                raise ShardingError(f"{name} = {value!r} is not {wanted}") from error
            object.__setattr__(self, name, plain)

    @staticmethod
    @takes(path=(str, pathlib.Path))
    def load(path: str | pathlib.Path) -> Rules:
        """Read rules from a TOML file.

        Raises:
            ShardingError: if the file cannot be read, or is malformed.

        >>> _ = pathlib.Path("rules.toml").write_text('fallback = "data"')
        >>> lx.sharding.Rules.load("rules.toml").fallback
        ('data',)
        """
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: not text, or a null byte in the name
            raise ShardingError(f"rules {str(path)!r}: no readable TOML file: {first_line(error)}") from error
        return Rules.parse(text, name=str(path))

    @staticmethod
    @takes(text=str)
    def parse(text: str, *, name: str = "") -> Rules:
        """Read rules from TOML text; `name` is used in messages. In a spec, `""` stands for an axis that is not cut.

        Raises:
            ShardingError: for malformed TOML, an unknown key, a wrong type or an invalid pattern.

        >>> rules = lx.sharding.Rules.parse('''
        ... batch = "data"
        ... fallback = "data"
        ... logical = { mlp = "model", embed = "" }
        ...
        ... [[rules]]
        ... weights = ".*/query/kernel"
        ... spec = ["", "model"]
        ... ''')
        >>> rules.rules, rules.logical
        ((('.*/query/kernel', P(None, 'model')),), {'mlp': ('model',), 'embed': ()})
        """
        try:
            file = toml.parsed(text, _File)
            return Rules(
                [(rule.weights, rule.spec) for rule in file.rules],
                file.logical,
                file.fallback,
                file.fallback_bytes,
                file.batch,
            )
        except (ValueError, ShardingError) as error:
            raise ShardingError(f"rules {name!r}: {error}") from error

    @takes(leaves=(Program, Mapping), mesh=(Mesh, AbstractMesh), axes=Mapping)
    def resolve(
        self,
        leaves: Mapping[str, Any] | Program,
        mesh: AnyMesh,
        *,
        axes: Mapping[str, Sequence[Part]] | None = None,
    ) -> Placement:
        """Decide where each weight goes.

        Args:
            leaves: path -> array, or its shape; or a program, whose weights and logical names are used.
            mesh: from `mesh`, or any JAX mesh.
            axes: logical names of the axes by path; by default those of the program.

        Raises:
            ShardingError: if a rule, or a key of `logical`, matches nothing; if a rule is never reached because earlier
                ones match the same weights; if a spec does not fit its weight; or if the mesh lacks an axis.

        >>> mesh = lx.sharding.mesh("model=1", jax.devices()[:1])
        >>> lx.sharding.Rules([("x", ("model",))]).resolve({"w": jnp.ones(4)}, mesh)
        Traceback (most recent call last):
        lepton_xla.errors.ShardingError: rule 'x' matches no weight; the weights are w
        """
        weights = leaves.weights if isinstance(leaves, Program) else leaves
        if axes is None:
            axes = leaves.axes if isinstance(leaves, Program) else {}
        sizes = dict(mesh.shape)
        batch = self.batch_axes(mesh)
        check_axes(axes_of(self.fallback), sizes, "fallback")
        for name, part in self.logical.items():
            check_axes(axes_of(part), sizes, f"logical axis {name!r}")
        for path, leaf in weights.items():
            if not hasattr(leaf, "shape"):
                raise ShardingError(f"weight {path!r} is a {type(leaf).__name__}, not an array or its shape")
        self._check_used(weights, axes)
        entries, shardings = [], dict[str, Any]()
        for path, leaf in weights.items():
            names = axes.get(path, ())
            spec, reason = self._decide(Leaf(path, tuple(leaf.shape), tree_bytes(leaf), tuple(names)), sizes)
            check_spec(spec, leaf.shape, sizes, f"weight {path!r}, {reason}")
            shardings[path] = placed(leaf, spec, mesh)
            entries.append(entry_of(path, leaf, spec, shardings[path], reason))
        return Placement(mesh, tuple(entries), shardings, batch)

    @property
    def of_batches_only(self) -> bool:
        """Whether the rules say nothing of weights.

        >>> lx.sharding.Rules(batch=()).of_batches_only, lx.sharding.Rules(fallback="data").of_batches_only
        (True, False)
        """
        return not (self.rules or self.logical or self.fallback)

    def batch_axes(self, mesh: AnyMesh) -> tuple[str, ...]:
        """Return the axes of a mesh that split the rows of a batch; none if the mesh lacks the default, `data`.

        Raises:
            ShardingError: if the mesh lacks another.

        >>> lx.sharding.Rules().batch_axes(lx.sharding.mesh("model=1", jax.devices()[:1]))
        ()
        """
        batch = axes_of(self.batch)
        if batch == _BATCH and "data" not in mesh.shape:
            return ()
        check_axes(batch, mesh.shape, "batch")
        return batch

    def _decide(self, leaf: Leaf, sizes: Mapping[str, int]) -> tuple[PartitionSpec, str]:
        """Find the spec of a weight, and the reason."""
        for pattern, spec in self.rules:
            if re.fullmatch(pattern, leaf.path):
                return as_spec(spec), f"rule {pattern!r}"
        spec, named = by_names(self.logical, leaf, sizes)
        if any(spec):
            return spec, named
        spec, why = by_size(axes_of(self.fallback), self.fallback_bytes, leaf, sizes)
        return spec, why if any(spec) else "; ".join(filter(None, (named, why)))

    def _check_used(self, weights: Iterable[str], axes: Mapping[str, Sequence[Part]]) -> None:
        """Raise `ShardingError` for a rule or a logical name that applies to nothing."""
        left = list(weights)
        for pattern, _ in self.rules:
            if not any(re.fullmatch(pattern, path) for path in weights):
                raise ShardingError(f"rule {pattern!r} matches no weight; the weights are {some_names(weights)}")
            rest = [path for path in left if not re.fullmatch(pattern, path)]
            if len(rest) == len(left):
                raise ShardingError(
                    f"rule {pattern!r} is never reached: earlier rules match all weights that it matches"
                )
            left = rest
        named = dict.fromkeys(name for path in axes for part in axes[path] for name in axes_of(part))
        for name in self.logical:
            if name not in named:
                raise ShardingError(f"no weight has the logical axis {name!r}; logical axes are {some_names(named)}")


class _Rule(msgspec.Struct, forbid_unknown_fields=True):
    weights: str
    spec: list[str | list[str]]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    rules: list[_Rule] = []
    logical: dict[str, str | list[str]] = {}
    fallback: str | list[str] = ""
    fallback_bytes: int = 1 << 20
    batch: str | list[str] = _BATCH[0]
