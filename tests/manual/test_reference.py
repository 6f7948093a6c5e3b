"""The reference has every name, command, option, recipe key, route, limit, metric and error that there is."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re

import msgspec
import pytest
from sources import TREES
from test_docstrings import PUBLIC

import lepton_xla
from lepton_xla import errors
from lepton_xla.recipe import PruneRule, QuantizeRule, Recipe, ShrinkRule
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.observe.exposition import render
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.protocol.routes import ROUTES
from manual import commands, exported, messages, recipes, serving, tables

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_every_public_name_is_in_the_reference():
    assert exported.packages(ROOT) == sorted(PUBLIC)
    modules = {name for name in lepton_xla.__all__ if inspect.ismodule(getattr(lepton_xla, name))}
    assert modules <= {name.removeprefix("lepton_xla.") for name in PUBLIC}
    pages = exported.pages(ROOT)
    for package in PUBLIC:
        page = pages[f"reference/python/{package}.md"]
        for name in importlib.import_module(package).__all__:
            shown = f"::: {package}.{name}\n" in page or f"## {name}\n" in page
            assert shown or f"{package}.{name}" in PUBLIC, f"{package}.{name}"


def test_a_name_of_two_packages_is_shown_once():
    pages = exported.pages(ROOT)
    shown = [name for page in pages.values() for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
    assert len(shown) == len(set(shown))
    assert "See [`lepton_xla.Recipe`][lepton_xla.Recipe]." in pages["reference/python/lepton_xla.recipe.md"]


def test_every_command_and_option():
    page = commands.page()
    paths = [context.command_path for context in commands.contexts()]
    assert {"leptonx serve", "leptonx repo push", "leptonx launch slurm"} <= set(paths)
    for context in commands.contexts():
        heading = f"{'#' * (context.command_path.count(' ') + 1)} {context.command_path}\n"
        section = page.partition(heading)[2].partition("\n##")[0]
        for parameter in context.command.params:
            for name in (*parameter.opts, *parameter.secondary_opts):
                assert not name.startswith("-") or re.search(rf"[` ]{name}[`, ]", section), (heading, name)


def test_every_recipe_key_has_its_text():
    page = recipes.page()
    for kind in (Recipe, PruneRule, QuantizeRule, ShrinkRule):
        for field in msgspec.structs.fields(kind):
            row = re.search(
                rf"^\| `{field.name}` \| \S.+<br>Values: `[^`]+`. Default: `[^`]+`. \|$", page, re.MULTILINE
            )
            assert row, field.name
    assert "`none, awq, smooth:...`" in page
    assert "`int8, int4, fp8_e4m3, fp8_e5m2, none`" in page


def test_every_limit_and_route():
    limits, routes = serving.limits_page(), serving.routes_page()
    for field in dataclasses.fields(Limits):
        assert f"`--{field.name.replace('_', '-')}`" in limits
    for route in ROUTES:
        assert f"| {route.method} | {tables.code(route.path)}" in routes, route.name


def test_every_metric_that_a_server_exports():
    known = {family.name for family in serving.metrics()}
    metrics = ServerMetrics()
    counted = metrics.opened("m", "1")
    counted.generations = counted.prompt_tokens = 1
    names = re.findall(r"^# TYPE (\S+) (?!summary)", render(metrics).decode(), re.MULTILINE)
    ours = {name for name in names if name.startswith(("lepton_", "nv_")) and not name.endswith("_created")}
    assert len(ours) > 40
    assert ours <= known, ours - known
    page = serving.metrics_page()
    assert all(f"`{name}`" in page for name in known)


def test_every_name_of_a_metric_in_the_source_is_known():
    """Also of those that are shown only once something was counted."""
    known = {family.name.removesuffix("_total") for family in serving.metrics()}
    written = {
        node.value
        for node in ast.walk(TREES["lepton_xla.serve.observe.exposition"])
        if isinstance(node, ast.Constant) and re.fullmatch(r"lepton_\w+", str(node.value))
    }
    assert written
    assert written - {"lepton_"} <= known


def test_every_error_has_its_messages_and_a_cure():
    found, faults = messages.messages(ROOT), (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert any(each.startswith("buckets lack the dimension <") for each in found["CompileError"])
    for name in messages.classes():
        assert f"\n### {name}\n" in faults, f"docs/faults.md lacks a section {name}: what to do about it"
        assert found[name], name
    assert set(messages.classes()) >= {name for name in errors.__dict__ if name.endswith("Error")} - {"LeptonError"}


def test_environment_variables_are_listed():
    page = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8") + commands.page()
    written = {
        node.value
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and re.fullmatch(r"LEPTON_[A-Z_]+[A-Z]", str(node.value))
    }
    assert len(written) > 5
    for name in written:
        assert f"`{name}`" in page, name


@pytest.mark.parametrize(
    ("text", "expected"), [("a_b [c] `d_e`", r"a\_b \[c\] `d_e`"), ("x < y", r"x \< y"), ("**", r"\*\*")]
)
def test_text_is_not_taken_for_markup(text, expected):
    assert tables.plain(text) == expected
