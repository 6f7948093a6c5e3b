"""Files of TOML that are none: whoever reads one refuses it in a line, whatever tomllib raises."""

import pytest

import lepton_xla as lx
from lepton_xla.cli import rollout
from lepton_xla.serve.models.settings import parse_settings
from lepton_xla.serve.monitor.rules import Rules
from lepton_xla.trust.keys import _not_before_s
from lepton_xla.tuning.deployments import Prices


def read_rollout(text):
    with open("rollout.toml", "w") as file:
        file.write(text)
    return rollout._read("rollout.toml")


@pytest.mark.parametrize(
    "read",
    [
        Prices.parse, Rules.parse, lx.sharding.Rules.parse, parse_settings, read_rollout,
        lambda text: lx.Recipe.parse(text, name="r"), lambda text: _not_before_s(text.encode(), "policy.toml"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", ["a = ", "a = " + "[" * 5000, "a = " + "1" * 5000, "a = 2026-13-45", "\0"])
def test_what_is_no_toml_is_refused_in_a_line(read, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lx.LeptonError) as caught:
        read(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
