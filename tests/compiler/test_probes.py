"""What a model is run on to check it: ids of its tables, masks that hide nothing, and the user's own inputs."""

import compiler_models as models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_xla import compiler
from lepton_xla.compiler.probes import probe, table_sizes
from lepton_xla.errors import CompileError
from lepton_xla.program import TensorSpec, trace

IDS = {"ids": TensorSpec(("batch", "seq"), "int32")}
SIZES = {"batch": (3,), "seq": (2, 8)}
PLACES = np.random.default_rng(1).standard_normal((1, 8, models.WIDTH)).astype(np.float32)


def masked_attention(w, ids):
    """Attention over all that is not id 0, as tokenizers pad: of a row of nothing else, over every place there is."""
    x = w["table"][ids] + w["places"][:, : ids.shape[1]]
    scores = jnp.where((ids != 0)[:, None], x @ x.mT, -1e9)
    return {"tokens": jax.nn.softmax(scores) @ x @ w["head"]}


def test_a_model_that_masks_its_padding_by_id_is_compiled(tmp_path):
    program = trace(masked_attention, models.text_weights() | {"places": PLACES}, IDS)
    compiler.compile(program, SIZES).save(tmp_path / "a.lepton")
    ids = np.array([[4, 7, 9]], np.int32)
    w = {name: value.astype(np.float64) for name, value in models.text_weights().items()}
    x = w["table"][ids] + PLACES[:, :3]
    share = np.exp(x @ x.mT)
    expected = share / share.sum(-1, keepdims=True) @ x @ w["head"]
    np.testing.assert_allclose(compiler.load(tmp_path / "a.lepton")(ids=ids)["tokens"], expected, rtol=1e-4, atol=1e-4)


def test_the_message_says_what_to_do():
    def unmasked(w, ids):
        return w["table"][ids].mean(1)

    program = trace(unmasked, models.text_weights(), IDS)
    cure = r"The check used random values for ids; .* pass some as compile\(examples=\.\.\.\)"
    with pytest.raises(CompileError, match=cure):
        compiler.compile(program, SIZES)
    given = {"ids": np.arange(1, 17, dtype=np.int32).reshape(2, 8)}
    with pytest.raises(CompileError, match=r"over that dimension$"):
        compiler.compile(program, SIZES, examples=given)


@pytest.mark.parametrize(
    "look",
    [
        lambda w, ids: w["table"][ids],
        lambda w, ids: jnp.take(w["table"], ids, axis=0, mode="fill"),
        lambda w, ids: jax.vmap(jax.vmap(lambda i: jax.lax.dynamic_index_in_dim(w["table"], i, keepdims=False)))(ids),
        lambda w, ids: jax.jit(jax.checkpoint(lambda t, i: t[i]))(w["table"], ids) + w["large"][ids],
    ],
)
def test_ids_are_drawn_from_the_smallest_table(look):
    weights = {"table": np.ones((50, 4), np.float32), "large": np.ones((90, 4), np.float32)}
    inputs = {**IDS, "mask": TensorSpec(("batch", "seq"), "int32"), "flag": TensorSpec((), "bool")}
    program = trace(lambda w, ids, mask, flag: look(w, ids) * mask[..., None].astype(np.float32), weights, inputs)
    tables = table_sizes(program.jaxpr({"batch": 2, "seq": 3}), list(inputs))
    assert tables == {"ids": 50}
    ids, mask, flag = probe(inputs, {"batch": 40, "seq": 40}, {}, tables, seed=0)
    assert (ids.min(), ids.max(), mask.min(), mask.max(), flag.shape) == (1, 49, 0, 1, ())
    _, mask, _ = probe(inputs, {"batch": 40, "seq": 40}, {}, tables, seed=0, lowest=1)
    assert mask.min() == 1
