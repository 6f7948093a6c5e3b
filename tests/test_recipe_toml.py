"""Recipes as TOML text: what is read again is equal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.recipe import PruneRule, QuantizeRule, Recipe, ShrinkRule, presets, to_toml


@pytest.mark.parametrize("name", presets())
def test_presets_come_back_equal(name):
    recipe = Recipe.load(name)
    assert Recipe.parse(to_toml(recipe), name="other") == recipe


@given(st.text(min_size=1).filter(lambda text: text.strip()), st.sampled_from([(), "b.*", ("b", "c\\.d")]))
def test_any_text_comes_back_equal(text, exclude):
    import re

    recipe = Recipe(
        name=text,
        description=text,
        measure=False,
        shrink=ShrinkRule(flops=0.5, round_to=(8, 16), protect=("a", "b")),
        prune=(PruneRule(sites=re.escape(text), sparsity=0.5, exclude=exclude),),
        quantize=(
            QuantizeRule(sites=re.escape(text), weights="codebook8", activations="none"),
            QuantizeRule(sites="x"),
        ),
    )
    assert Recipe.parse(to_toml(recipe), name="other") == recipe
