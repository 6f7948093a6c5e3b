"""The CNN of `examples/digits.py` on scikit-learn's handwritten digits."""

from __future__ import annotations

import dataclasses
import sys

import jax

from models.base import ROOT, BenchModel, cached


def model(*, quick: bool = False) -> BenchModel:
    """The trained CNN."""
    sys.path.insert(0, str(ROOT / "examples"))
    import digits

    shapes = jax.eval_shape(digits.DigitsNet().init, jax.random.key(0), digits.data()[0][:1])
    epochs = 2 if quick else digits.EPOCHS
    variables = cached(f"digits-{epochs}", lambda: _ordered(digits.train(epochs), shapes), shapes)
    images = digits.data()[0]
    spec = lx_spec(digits, variables)
    spec = dataclasses.replace(spec, calibration=[{"image": images[k : k + 64]} for k in range(0, 256, 64)])
    note = "1,797 UCI handwritten digits of 8 x 8 pixels (scikit-learn's copy): 1,347 for training, 450 for testing"
    return BenchModel("digits", note, spec, (digits.DigitsNet(), variables))


def lx_spec(digits, variables):
    """The example's own specification on these weights."""
    import lepton_xla as lx

    return lx.ModelSpec(
        module=digits.DigitsNet(),
        weights=variables,
        inputs={"image": lx.TensorSpec(("batch", 8, 8, 1), "float32")},
        buckets={"batch": (1, 8, 32)},
        evaluate=digits.evaluate,
    )


def _ordered(variables, shapes):
    return jax.tree.map(lambda _, leaf: leaf, shapes, {name: variables[name] for name in shapes})
