"""`leptonx doctor`: each fault is found, said, and has its advice; the exit code tells whether there is one."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from lepton_xla.cli import doctor as doctor_command
from lepton_xla.environment import diagnosis, requirements
from lepton_xla.environment.requirements import Requirement

WELL = {
    "failure": "",
    "jax": "0.12.0",
    "modules": 1000,
    "byte_code": 990,
    "flax": "0.12.12",
    "kernels": "0.1.0",
    "problem": "",
    "variant": "avx512",
    "interface": 3,
    "off": False,
    "devices": ["cpu cpu", "cpu cpu"],
    "computes": True,
}


@pytest.fixture
def examined(monkeypatch, tmp_path):
    """What `diagnose` finds, by name, if the other process tells these facts instead of the good ones."""
    monkeypatch.setenv("LEPTON_CACHE", str(tmp_path))
    for name in ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_DISABLE_JIT"):
        monkeypatch.delenv(name, raising=False)

    def examine(without=(), **facts):
        told = {name: value for name, value in (WELL | facts).items() if name not in without}
        monkeypatch.setattr(diagnosis, "_probe", lambda _timeout_s: told)
        return {finding.name: finding for finding in diagnosis.diagnose()}

    return examine


def test_nothing_is_found_where_nothing_is_wrong(examined):
    found = examined()
    assert {finding.state for finding in found.values()} == {"ok"}
    assert found["jax"].found.startswith(importlib.metadata.version("jax"))
    assert found["devices"].found == "2 x cpu cpu"


@pytest.mark.parametrize(
    ("facts", "name", "state", "said", "advice"),
    [
        ({"flax": None, "flax_error": "AttributeError: jax.x"}, "flax and jax", "fault", "jax.x", "flax 0.12.12"),
        ({"flax": None, "flax_error": ""}, "flax and jax", "note", "not installed", "lepton-xla[flax]"),
        ({"byte_code": 200}, "byte code", "note", "800 of 1000", "compileall"),
        ({"kernels": None}, "kernels", "note", "not installed", "make kernels"),
        ({"problem": "has interface 9"}, "kernels", "fault", "has interface 9", "build them again"),
        ({"off": True}, "kernels", "note", "switched off", "LEPTON_KERNELS"),
        ({"variant": "portable"}, "kernels", "note", "portable", "AVX2"),
        ({"computes": False}, "computes", "fault", "wrong", "XLA_FLAGS"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(examined, facts, name, state, said, advice):
    found = examined(**facts)[name]
    assert (found.state, said in found.found, advice in found.advice) == (state, True, True)


def test_what_comes_after_a_failure_is_not_judged(examined):
    found = examined(without=("devices", "computes"), failure="F0000 Unknown flag in XLA_FLAGS: --xla_nope")
    assert found["devices"].state == "fault"
    assert "--xla_nope" in found["devices"].found
    assert found["computes"].found == "not examined, because devices failed"
    assert found["kernels"].state == "ok"


@pytest.mark.parametrize(
    ("variable", "value", "name", "said"),
    [
        ("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=", "XLA_FLAGS", "int8"),
        ("XLA_FLAGS", "--xla_cpu_max_isa=AVX2", "XLA_FLAGS", "not use all of this CPU"),
        ("JAX_DISABLE_JIT", "1", "JAX_DISABLE_JIT", "is 1"),
        ("LEPTON_CACHE", "off", "cache", "not kept"),
        ("LEPTON_CACHE", "/proc/1/nothing", "cache", "cannot be written"),
    ],
)
def test_settings_that_cost_time_are_notes(examined, monkeypatch, variable, value, name, said):
    monkeypatch.setenv(variable, value)
    found = examined()[name]
    assert (found.state, said in found.found) == ("note", True)
    assert found.advice


def test_packages_that_are_missing_or_unfit_are_faults(examined, monkeypatch):
    asked = [
        Requirement("jax", ">=0.11.1,<0.13", installed="0.13.1"),
        Requirement("rich", ">=14"),
        Requirement("optuna", ">=5,<6", extra="tune", installed="4.0"),
        Requirement("river", "", extra="drift"),
    ]
    monkeypatch.setattr(diagnosis, "requirements", lambda: asked)
    found = examined()
    assert [name for name, finding in found.items() if finding.state == "fault"] == ["jax", "rich", "optuna"]
    assert found["jax"].advice == "pip install 'jax>=0.11.1,<0.13'"
    assert found["optuna"].advice == "pip install 'lepton-xla[tune]'"
    assert found["extras"].found == "installed: none; not installed: tune, drift"


def test_a_package_that_is_not_installed_is_said(examined, monkeypatch):
    def missing():
        raise importlib.metadata.PackageNotFoundError("lepton-xla")

    monkeypatch.setattr(diagnosis, "requirements", missing)
    assert examined()["lepton-xla"].state == "fault"


@pytest.mark.parametrize(
    ("version", "versions", "expected"),
    [
        ("0.12.0.1", ">=0.11.1,<0.13", True),
        ("0.13.0", ">=0.11.1,<0.13", False),
        ("0.13.0rc1", "<0.13", False),
        ("1.0", "==1.0.0", True),
        ("1.0.1", "!=1.0", True),
        ("5.1", "~=5.0", True),
        ("6.0", "~=5.0", False),
        ("1769699998!10", ">=2", True),
        ("10.1", ">9.9", True),
        ("3", "<=3.0", True),
        ("1", "", True),
    ],
)
def test_which_versions_fit(version, versions, expected):
    assert Requirement("some", versions, installed=version).fits is expected


def test_an_extra_of_another_package_counts_as_its_parts(monkeypatch):
    def version(name):
        if name not in ("jax", "here"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ["here; extra == 'cpu'", 'jax-cuda12-plugin<2,>=1; extra == "cuda12"']
    )
    found = requirements.requirements(["jax[cpu]>=1; extra == 'a'", 'jax[cuda12]>=1; extra == "b"', "lepton_xla[a]"])
    assert [(each.name, each.extra, each.fits) for each in found] == [
        ("jax[cpu]", "a", True),
        ("jax[cuda12]", "b", False),
    ]


def test_the_command_says_the_same_and_ends_with_1_if_there_is_a_fault(examined, monkeypatch):
    from click.testing import CliRunner

    examined(computes=False)
    result = CliRunner().invoke(doctor_command.doctor, ["--json"])
    document = json.loads(result.stdout)
    assert (result.exit_code, document["ok"]) == (1, False)
    assert [each["name"] for each in document["findings"] if each["state"] == "fault"] == ["computes"]
    text = CliRunner().invoke(doctor_command.doctor).stdout
    assert "fault, computes: remove flags from XLA_FLAGS" in text
    assert "1 faults, 0 notes" in text
    examined()
    assert CliRunner().invoke(doctor_command.doctor).exit_code == 0


def test_a_flag_that_ends_the_process_is_found():
    """In processes of their own, as a user has them."""
    command = [sys.executable, "-m", "lepton_xla", "doctor", "--json"]
    environ = os.environ | {"XLA_FLAGS": "--xla_nope=1", "LEPTON_CACHE": "off", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert found["jax starts"]["state"] == found["flax and jax"]["state"] == "ok"
    assert "Unknown flag in XLA_FLAGS: --xla_nope=1" in found["devices"]["found"]
    assert "XLA_FLAGS" in found["devices"]["advice"]
