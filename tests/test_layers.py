"""Which part may import which: `docs/design.md` draws it, and nothing else is allowed, not even for types only.

A drawing is a mermaid flowchart whose first line names a package. `a --> b & c` lets `a` import `b`, `c`, and all that
arrows lead to from those. `a -.-> b` lets functions of `a` import `b` and no more.
"""

import graphlib
import pathlib
import re

import pytest
from sources import FILES, imports

DESIGN = (pathlib.Path(__file__).resolve().parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
PACKAGES = sorted(module for module, path in FILES.items() if path.name == "__init__.py")


def drawing(text):
    """By drawn package: what each part points to with whole arrows, and with dotted ones."""
    found = {}
    for block in re.findall(r"```mermaid\nflowchart \w+\n    %% (.*?)```", text, re.DOTALL):
        package, *lines = block.splitlines()
        whole, dotted = found[package] = {}, {}
        for line in lines:
            user, arrow, used = re.fullmatch(r" *(\S+) (-->|-\.->) (.*)", line).groups()
            for name in (user, *used.split(" & ")):
                whole.setdefault(name, set())
            (whole if arrow == "-->" else dotted).setdefault(user, set()).update(used.split(" & "))
    return found


DRAWN = drawing(DESIGN)


def below(arrows, part):
    """Everything that arrows lead to from a part."""
    seen, todo = set(), [part]
    while todo:
        new = arrows[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def child(package, module):
    """The part of a package that a module is in; None for the package itself and for what is outside of it."""
    inside = module.removeprefix(package + ".")
    return None if inside == module else inside.split(".")[0]


def edges(package, known=FILES, imported=imports):
    """Who imports whom among the parts of a package: `{(user, used): "module -> module"}`."""
    found = {}
    for module in set(known) - {"lepton_xla.__main__"}:
        for name in imported(module):
            user, used = child(package, module), child(package, name)
            if user and used and user != used and name in known:
                found[user, used] = f"{module} -> {name}"
    return found


def at_once(module):
    """What runs with the module itself, and not only when one of its functions is called."""
    return imports(module, everywhere=False)


@pytest.mark.parametrize("package", DRAWN)
def test_nothing_is_imported_that_is_not_drawn(package):
    whole, dotted = DRAWN[package]
    assert set(whole) == {child(package, module) for module in FILES} - {None, "__main__"}, "draw what is there"
    allowed = {part: below(whole, part) for part in whole}
    for found, more in ((edges(package), dotted), (edges(package, imported=at_once), {})):
        refused = {
            pair: text for pair, text in found.items() if pair[1] not in allowed[pair[0]] | more.get(pair[0], set())
        }
        assert not refused
    drawn = {(user, used) for arrows in (whole, dotted) for user in arrows for used in arrows[user]}
    assert drawn <= set(edges(package)), "an arrow that nothing needs"


def test_the_table_of_places_has_every_part():
    table = DESIGN.partition("## Where things are")[2].partition("In the drawings")[0]
    listed = {
        name.removesuffix(".py").strip("/")
        for line in table.splitlines()
        for name in line.split("|")[1:2]
        for name in re.findall(r"`([^`]+)`", name)
    }
    assert listed == set(DRAWN["lepton_xla"][0])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_imports_go_in_a_circle(package):
    arrows = {}
    for user, used in edges(package):
        arrows.setdefault(user, set()).add(used)
    list(graphlib.TopologicalSorter(arrows).static_order())


def test_nothing_is_imported_from_the_packages_around_it():
    """A package imports its modules, so that would be a circle."""
    for module in FILES:
        around = {module[: match.start()] for match in re.finditer(r"\.", module)}
        assert not around & imports(module), module


def test_the_checks_see_what_they_look_for():
    imported = {"p.a.x": {"p.b.y"}, "p.b.y": {"p.c"}, "p.c": {"p.a.x", "q"}, "p.a": set(), "p.b": set()}
    found = edges("p", imported, imported.get)
    assert set(found) == {("a", "b"), ("b", "c"), ("c", "a")}
    assert found["c", "a"] == "p.c -> p.a.x"
    drawn = drawing("```mermaid\nflowchart TD\n    %% p\n    a --> b & c\n    b --> d\n    a -.-> e\n```\n")
    assert drawn == {"p": ({"a": {"b", "c"}, "b": {"d"}, "c": set(), "d": set(), "e": set()}, {"a": {"e"}})}
    assert below(drawn["p"][0], "a") == {"b", "c", "d"}


def test_files_are_of_one_idea():
    lines = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values())
    assert lines[-1] <= 500
    assert lines[len(lines) // 2] <= 150
