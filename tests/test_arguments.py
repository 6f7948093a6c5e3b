"""What is handed to public functions is of the kind they take, or refused by name."""

import inspect

import pytest

import lepton_xla as lx
from lepton_xla import tuning
from lepton_xla.errors import LeptonError

PUBLIC = [
    getattr(module, name)
    for module in (lx, lx.passes, lx.train, tuning)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
]
PARAMETERS = {
    f"{fn.__name__}-{parameter.name}": (fn, parameter)
    for fn in PUBLIC
    for parameter in inspect.signature(fn).parameters.values()
    if str(parameter.annotation).removesuffix(" | None") in ("Program", "Plan", "Recipe", "Groups")
}


def test_all_of_them_are_looked_at():
    assert {"weights_report-plan", "prune-program", "optimize-recipe", "importance_scores-groups"} <= set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_is_of_another_kind_is_refused_by_name(name):
    fn, parameter = PARAMETERS[name]
    kind = parameter.annotation.removesuffix(" | None")
    with pytest.raises(LeptonError, match=rf"^{fn.__name__}: {parameter.name} = 5 is a int, not a {kind}; \S+ "):
        fn(**{parameter.name: 5})
    if parameter.default is not None:
        with pytest.raises(LeptonError, match=f"{parameter.name} is a NoneType"):
            fn(**{parameter.name: None})
