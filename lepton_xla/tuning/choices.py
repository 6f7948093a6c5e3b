"""What a weight may become, and the groups of sites that get the same."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax

from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.sites import Site, find_sites, operand_value, rewrite_sites
from lepton_xla.passes.core.walker import Context, Values, materialize
from lepton_xla.passes.planning import resolve
from lepton_xla.program import Program, probe_sizes
from lepton_xla.recipe import PruneRule, QuantizeRule, Recipe
from lepton_xla.trees import abstract


@dataclasses.dataclass(frozen=True)
class Choice:
    """One thing that a weight may become.

    Attributes:
        name: what tables call it.
        quantize: keys of a `[[quantize]]` block, without `sites`; None leaves the weight in float.
        sparsity: share of its elements to set to zero; 0 prunes nothing.

    >>> from lepton_xla.tuning import CHOICES, Choice
    >>> CHOICES[0]
    Choice(name='float', quantize=None, sparsity=0.0)
    """

    name: str
    quantize: Mapping[str, Any] | None = None
    sparsity: float = 0.0


def _stored(weights: str, **more: Any) -> dict[str, Any]:
    return {"weights": weights, "activations": "none", **more}


_INT4 = _stored("int4", granularity="group:~64", weight_range="mse")
CHOICES = (
    Choice("float"),
    Choice("int8 x int8", {"weights": "int8", "activations": "int8"}),
    Choice("int8", _stored("int8")),
    Choice("int4", _INT4),
    Choice("16 levels", _stored("codebook16")),
    Choice("8 levels", _stored("codebook8")),
    Choice("4 levels", _stored("codebook4")),
    Choice("16 levels, 50 % zeros", _stored("codebook16"), 0.5),
    Choice("16 levels, 75 % zeros", _stored("codebook16"), 0.75),
    Choice("16 levels, 90 % zeros", _stored("codebook16"), 0.9),
    Choice("int8 x int8, 50 % zeros", {"weights": "int8", "activations": "int8"}, 0.5),
)
"""What each weight may become by default; the first is to leave it as it is."""


@dataclasses.dataclass(frozen=True)
class Methods:
    """How the weights of a whole program are rounded and pruned.

    Attributes:
        rescale, rounding: as in a `Recipe`.
        prune: the method of its `[[prune]]` blocks.

    >>> from lepton_xla.tuning import Methods
    >>> Methods().rounding
    'nearest'
    """

    rescale: str = "none"
    rounding: str = "nearest"
    prune: str = "magnitude"


# What is tried, in this order: the first is used until a recipe is found, the others then on what was found.
METHODS = (
    Methods(rounding="gptq", prune="sparsegpt"),
    Methods("smooth:0.5", "gptq", "sparsegpt"),
    Methods(),
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Sites that get the same choice, because they share a weight or an input.

    Attributes:
        sites: their names, in the order of execution.
        paths: paths of their weights.
        choices: what they may become; the first leaves them in float.
    """

    sites: tuple[str, ...]
    paths: tuple[str, ...]
    choices: tuple[Choice, ...]

    def only(self, names: Container[str]) -> Group:
        """The group with the choices of these names.

        >>> Group(("a",), ("w",), CHOICES).only({"float", "int8"}).choices == (CHOICES[0], CHOICES[2])
        True
        """
        return dataclasses.replace(self, choices=tuple(each for each in self.choices if each.name in names))


def find_groups(program: Program, choices: Sequence[Choice] = CHOICES) -> tuple[tuple[Group, ...], dict[str, Plan]]:
    """Find the groups of a program, and the plan that each choice means for all its sites.

    Args:
        program: a program whose computed weights are evaluated, as `plan_for` gives it.
        choices: what may be chosen; the first must leave the weight in float.

    Returns:
        The groups, in the order of execution, and plans by the names of choices.

    >>> x = lx.TensorSpec(("batch", 4), "float32")
    >>> program = lx.trace(lambda w, x: (x @ w["q"]) * (x @ w["k"]), {"q": jnp.eye(4), "k": jnp.eye(4)}, {"x": x})
    >>> groups, _ = find_groups(program)
    >>> [group.sites for group in groups]  # both multiply x
    [('q', 'k')]
    """
    found, shared = find_sites(program), _shared_inputs(program)
    plans = {each.name: resolve(_everywhere(each), program, sites=found) for each in choices}
    joined: list[tuple[set[Any], list[Site]]] = []
    for site in found:
        if site.path is None:
            continue
        keys: set[Any] = {site.path, shared.get(site.name, site.path)}
        same = [each for each in joined if each[0] & keys]
        joined = [each for each in joined if not each[0] & keys]
        members = [member for each in same for member in each[1]]
        joined.append((keys.union(*(each[0] for each in same)), [*members, site]))
    order = {site.name: index for index, site in enumerate(found)}
    sets = sorted(
        (sorted(members, key=lambda site: order[site.name]) for _, members in joined), key=lambda s: order[s[0].name]
    )
    groups = [_group(sites, choices, plans) for sites in sets]
    return tuple(group for group in groups if len(group.choices) > 1), plans


def recipe_of(
    name: str, picked: Sequence[tuple[Group, Choice]], methods: Methods, *, unpack: str = "measured"
) -> Recipe:
    """Write down what each group gets, as a recipe.

    >>> group = Group(("a/kernel", "b/kernel"), ("a/kernel", "b/kernel"), CHOICES)
    >>> recipe = recipe_of("mine", [(group, CHOICES[2])], Methods())
    >>> recipe.quantize[0].sites, recipe.quantize[0].weights
    ('a/kernel|b/kernel', 'int8')
    """
    by_choice: dict[str, tuple[Choice, list[str]]] = {}
    for group, choice in picked:
        by_choice.setdefault(choice.name, (choice, []))[1].extend(group.sites)
    prune, quantize = list[PruneRule](), list[QuantizeRule]()
    for choice, sites in by_choice.values():
        pattern = "|".join(map(re.escape, sites))
        if choice.sparsity:
            prune.append(PruneRule(sites=pattern, sparsity=choice.sparsity, method=methods.prune))
        if choice.quantize is not None:
            quantize.append(QuantizeRule(sites=pattern, **choice.quantize))
    any_small, any_zeros = bool(quantize), bool(prune)
    return Recipe().replace(
        name=name,
        on_unsupported="keep",
        unpack=unpack,
        rescale=methods.rescale if any_small else "none",
        rounding=methods.rounding if any_small else "nearest",
        prune=prune if any_zeros else (),
        quantize=quantize,
    )


def _everywhere(choice: Choice) -> Recipe:
    """The recipe that gives every site one choice."""
    prune = [PruneRule(sites=".*", sparsity=choice.sparsity)] if choice.sparsity else []
    quantize = [QuantizeRule(sites=".*", **choice.quantize)] if choice.quantize is not None else []
    return Recipe().replace(name=choice.name, on_unsupported="keep", prune=prune, quantize=quantize)


def _group(sites: Sequence[Site], choices: Sequence[Choice], plans: Mapping[str, Plan]) -> Group:
    """The group of some sites, with the choices that all of them can take, each once."""
    possible: dict[tuple[str, ...], Choice] = {}
    for choice in choices:
        entries = [plans[choice.name][site.name] for site in sites]
        planned = [entry for entry in entries if entry is not None]
        if choice.quantize is not None and any(entry.quantize is None for entry in planned):
            continue
        if choice.sparsity and any(entry.prune is None for entry in planned):
            continue
        possible.setdefault(tuple(entry.describe() for entry in planned), choice)
    names = tuple(site.name for site in sites)
    paths = dict.fromkeys(site.path for site in sites if site.path is not None)
    return Group(names, tuple(paths), tuple(possible.values()))


def _shared_inputs(program: Program) -> dict[str, int]:
    """By site, a number that sites with the same input share."""
    inputs: list[Any] = []
    shared: dict[str, int] = {}

    def record(site: Site, context: Context, eqn: Any, values: Values) -> Values:
        if site.weight_operand is not None:
            value = materialize(values[1 - site.weight_operand])
            known = next((index for index, other in enumerate(inputs) if other is value), len(inputs))
            inputs.append(value)
            shared[site.name] = known
        return context.bind(eqn, [operand_value(each) for each in values])

    sizes = probe_sizes(program.fn, program.weights, program.inputs)[0]
    looked = rewrite_sites(program.fn, record, inline=True, on_unknown="keep")
    jax.eval_shape(looked, abstract(program.weights), *program.abstract_inputs(sizes))
    return shared
