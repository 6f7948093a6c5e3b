"""Partition rules: which decides, why weights stay whole, and what does not fit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lepton_xla as lx
from lepton_xla.sharding import Rules
from lepton_xla.sharding.meshes import abstract_mesh

MESH = abstract_mesh("data=4,model=2", 8)
WEIGHTS = {
    "emb": jax.ShapeDtypeStruct((12, 8), jnp.float32),
    "a/up": jax.ShapeDtypeStruct((8, 32), jnp.float32),
    "a/down": jax.ShapeDtypeStruct((32, 8), jnp.bfloat16),
    "bias": jax.ShapeDtypeStruct((6,), jnp.float32),
    "step": jax.ShapeDtypeStruct((), jnp.int32),
}


def decided(rules, axes=None, weights=WEIGHTS, mesh=MESH):
    return {entry.path: entry for entry in rules.resolve(weights, mesh, axes=axes).entries}


def test_the_first_rule_that_matches_decides():
    rules = Rules([("a/up", (None, "model")), ("a/.*", ["model"]), (".*mb", (("data", "model"),))])
    with pytest.raises(
        lx.ShardingError, match=r"weight 'emb', rule '.\*mb': axis 0 of \(12, 8\) cannot be cut by data=4"
    ):
        decided(rules)
    found = decided(Rules([*rules.rules[:2], ("emb", ("data", "model"))]))
    assert [found[path].spec for path in WEIGHTS] == [P("data", "model"), P(None, "model"), P("model"), P(), P()]
    assert found["a/down"].reason == "rule 'a/.*'"
    assert found["bias"].reason == "no rule matches, and there is no fallback"


def test_a_device_holds_its_share_of_the_bytes():
    placement = Rules([("a/up", (None, "model"))], fallback="data", fallback_bytes=500).resolve(WEIGHTS, MESH)
    entries = {entry.path: entry for entry in placement.entries}
    assert (entries["a/up"].size_bytes, entries["a/up"].device_bytes) == (8 * 32 * 4, 8 * 32 * 4 // 2)
    assert entries["a/down"].device_bytes == 32 * 8 * 2 // 4
    assert placement.device_bytes == 12 * 8 * 4 + 8 * 32 * 2 + 32 * 8 * 2 // 4 + 24 + 4


@pytest.mark.parametrize(
    ("axes", "spec", "pieces"),
    [("data", P("data"), 4), (["data", "model"], P(("data", "model")), 8), ("model", P("model"), 2)],
)
def test_the_fallback_cuts_the_largest_divisible_axis(axes, spec, pieces):
    found = decided(Rules(fallback=axes, fallback_bytes=0))
    assert found["a/down"].spec == spec
    assert found["a/down"].device_bytes == 512 // pieces
    assert found["a/up"].spec == P(None, *spec)
    # 8 divides 8 but not 12; 4 and 2 divide both, and 12 is larger.
    assert found["emb"].spec == (P(None, *spec) if pieces == 8 else spec)
    assert found["step"].reason == "a scalar"
    if pieces > 2:
        assert found["bias"].spec == P()
        assert "divides none of its axes" in found["bias"].reason


def test_small_weights_stay_whole():
    found = decided(Rules(fallback="data", fallback_bytes=400))
    assert found["emb"].reason == "384 B; the fallback begins at 400 B"
    assert found["a/down"].spec == P("data")
    assert decided(Rules(fallback="data", fallback_bytes=384))["emb"].spec == P("data")


def test_logical_names_decide_between_rules_and_fallback():
    axes = {"a/up": ("embed", "mlp"), "a/down": ("mlp", "embed"), "emb": ("vocab", "embed"), "bias": ("embed", "mlp")}
    logical = {"mlp": "model", "vocab": ["model", "data"], "embed": ""}
    weights = WEIGHTS | {"emb": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
    found = decided(Rules([("a/down", ("data",))], logical, fallback="model", fallback_bytes=0), axes, weights)
    assert found["a/up"].spec == P(None, "model")
    assert found["a/up"].reason == "logical axis 'mlp'"
    assert found["a/down"].spec == P("data")
    assert found["emb"].spec == P(("model", "data"))
    assert found["bias"].reason == "fallback: largest axis"  # two names for one axis: not of this weight


def test_a_logical_name_that_is_a_mesh_axis_stands_for_itself():
    found = decided(Rules(), {"a/up": ("data", "model"), "a/down": (None, ("data", "model")), "emb": ("fsdp", "tp")})
    assert found["a/up"].spec == P("data", "model")
    assert found["a/down"].spec == P(None, ("data", "model"))
    assert found["emb"].reason == (
        "nothing cuts its logical axes (fsdp, tp); no rule matches, and there is no fallback"
    )


def test_two_logical_axes_cannot_be_cut_by_one_mesh_axis():
    found = decided(
        Rules(logical={"embed": "data", "mlp": "data"}), {"a/up": ("embed", "mlp"), "a/down": ("mlp", "embed")}
    )
    assert (found["a/up"].spec, found["a/down"].spec) == (P("data"), P("data"))


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (Rules([("nothing", ("data",))]), "rule 'nothing' matches no weight; the weights are emb, a/up"),
        (Rules([("a/.*", ("model",)), ("a/up", ("model",))]), "rule 'a/up' is never reached"),
        (
            Rules([("bias", ("model", None, "data"))]),
            r"weight 'bias', rule 'bias': spec \(model, -, data\) has 3 entries",
        ),
        (Rules([("bias", ("data",))]), "axis 0 of .6,. cannot be cut by data=4: 4 does not divide 6"),
        (Rules([("a/up", ("data", "data"))]), "the mesh axis 'data' occurs twice"),
        (Rules([("a/up", (("data", "data"),))]), "the mesh axis 'data' occurs twice"),
        (
            Rules([("a/up", ("dta",))]),
            "weight 'a/up', rule 'a/up': the mesh has no axis 'dta'; its axes are data=4, model=2",
        ),
        (Rules(fallback="fsdp"), "fallback: the mesh has no axis 'fsdp'"),
        (Rules(batch="dta"), "batch: the mesh has no axis 'dta'"),
        (Rules(batch=["data", "data"]), "batch: the mesh axis 'data' occurs twice"),
        (Rules(logical={"mlp": "tp"}), "logical axis 'mlp': the mesh has no axis 'tp'"),
        (Rules(logical={"mlp": "model"}), "no weight has the logical axis 'mlp'; logical axes are there is none"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(rules, said):
    with pytest.raises(lx.ShardingError, match=said):
        decided(rules)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rules = [{weights = '['}]", "missing required field `spec`"),
        ("rules = [{weights = '[', spec = []}]", r"rules\[0\] = .'\[', .*unterminated character set"),
        ("rules = [{weights = 'a', spec = [1]}]", r"\$.rules\[0\].spec"),
        ("fallbck = 'data'", "unknown field `fallbck`"),
        ("fallback = ", "rules 'mine': "),
    ],
)
def test_malformed_files_are_refused(text, said):
    with pytest.raises(lx.ShardingError, match=said):
        Rules.parse(text, name="mine")


def test_a_file_says_what_python_says(tmp_path):
    (tmp_path / "r.toml").write_text(
        'batch = ["data", "model"]\nfallback = "data"\nfallback_bytes = 7\nlogical = {mlp = "model", embed = ""}\n'
        '[[rules]]\nweights = "a/.*"\nspec = ["", ["data", "model"]]\n'
    )
    wanted = Rules([("a/.*", (None, ("data", "model")))], {"mlp": "model", "embed": None}, "data", 7, ("data", "model"))
    assert Rules.load(tmp_path / "r.toml") == wanted
    with pytest.raises(lx.ShardingError, match=r"no\.toml': no readable TOML file"):
        Rules.load(tmp_path / "no.toml")


def test_a_batch_is_split_over_its_axes():
    placement = Rules(batch=("data", "model")).resolve(WEIGHTS, MESH)
    assert placement.batch.spec == P(("data", "model"))
    placement.check_batch({"x": np.ones((16, 3)), "label": np.ones(8)})
    with pytest.raises(
        lx.ShardingError, match=r"batch\['label'\] has 12 rows, which data=4 and model=2 cannot split evenly"
    ):
        placement.check_batch({"x": np.ones((16, 3)), "label": np.ones(12)})
    with pytest.raises(lx.ShardingError, match=r"batch\['t'\] is a scalar"):
        placement.check_batch({"t": 1.0})
    only_model = Rules().resolve(WEIGHTS, abstract_mesh("model=2", 2))
    assert only_model.batch.spec == P()
    only_model.check_batch({"x": np.ones((3, 2))})


def test_weights_are_put_where_the_placement_says():
    mesh = lx.sharding.mesh("data=2")
    weights = {"w": np.arange(12.0, dtype=np.float32).reshape(3, 4), "b": jnp.ones(3)}
    put = Rules([("w", (None, "data"))]).resolve(weights, mesh).put(weights)
    assert [part.data.shape for part in put["w"].addressable_shards] == [(3, 2), (3, 2)]
    np.testing.assert_array_equal(put["w"], weights["w"])
    assert put["b"].is_fully_replicated
    placement = Rules().resolve(weights, mesh)
    with pytest.raises(lx.ShardingError, match="weight 'v' is not in the placement, which has w, b"):
        placement.put({"v": weights["w"]})
    with pytest.raises(lx.ShardingError, match=r"weight 'w' has shape \(3,\), the placement \(3, 4\)"):
        placement.put({"w": weights["b"]})


def test_a_placement_prints_in_eighty_columns():
    path = "/".join(["params", *(f"a_long_module_{number}" for number in range(9)), "kernel"])
    weights = {path: jax.ShapeDtypeStruct((4, 8, 16, 32), jnp.float32)} | WEIGHTS
    text = str(Rules(fallback=("data", "model"), fallback_bytes=300).resolve(weights, MESH))
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("weights on data=4, model=2 (8 devices)\n")
    assert "data+model" in text
    assert "512 B; the fallback" not in text


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = nn.relu(nn.Dense(8, kernel_init=inner)(x))
        return nn.Dense(4, kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("mlp", None)))(x)


def test_names_of_linen_axes_are_found_and_boxes_removed():
    module = Linen()
    boxed = module.init(jax.random.key(0), jnp.ones((1, 6)))
    program = lx.from_linen(module, boxed, {"x": lx.TensorSpec(("batch", 6), "float32")})
    assert program.axes == {"params/Dense_0/kernel": ("embed", "mlp"), "params/Dense_1/kernel": ("mlp", None)}
    x = jnp.ones((2, 6))
    np.testing.assert_array_equal(program(program.weights, x), module.apply(boxed, x))
    found = decided(Rules(logical={"mlp": "model"}), program.axes, program.weights)
    assert found["params/Dense_0/kernel"].spec == P(None, "model")
    assert found["params/Dense_1/kernel"].spec == P("model")
    assert [entry.spec for entry in Rules().resolve(program, MESH).entries] == [P()] * 4


def test_names_of_nnx_axes_are_found():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(6, 8, rngs=rngs, kernel_metadata={"out_sharding": ("embed", "mlp")})
            self.rest = nnx.List([nnx.Linear(8, 4, rngs=rngs, kernel_metadata={"out_sharding": P("mlp")})])

        def __call__(self, x):
            return self.rest[0](nnx.relu(self.up(x)))

    with nnx.use_eager_sharding(False):
        net = Net(nnx.Rngs(0))
    program = lx.from_nnx(net, {"x": lx.TensorSpec(("batch", 6), "float32")})
    assert program.axes == {"up/kernel": ("embed", "mlp"), "rest/0/kernel": ("mlp",)}
    found = Rules(logical={"mlp": "model", "embed": None}).resolve(program, MESH).entries
    assert {entry.path: entry.spec for entry in found if any(entry.spec)} == {
        "up/kernel": P(None, "model"),
        "rest/0/kernel": P("model"),
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"fallback": 3}, {"batch": 7}, {"logical": {"a": 3}}, {"logical": ["a"]}, {"fallback_bytes": "x"},
        {"rules": "abc"}, {"rules": [("w",)]}, {"rules": [("w", 3)]}, {"rules": [(3, ("model",))]},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_other_types_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(lx.ShardingError, match=name):
        Rules(**wrong)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Rules().resolve({"w": 3.0}, MESH),
        lambda: Rules().resolve([1], MESH),
        lambda: Rules().resolve(WEIGHTS, "model=2"),
        lambda: Rules().resolve(WEIGHTS, MESH).put({path: np.zeros(leaf.shape) for path, leaf in WEIGHTS.items()}),
        lambda: Rules().resolve(WEIGHTS, lx.sharding.mesh("data=2")).put({"emb": 3}),
        lambda: Rules.load(3),
        lambda: Rules.parse(3),
        lambda: lx.sharding.mesh(3),
        lambda: lx.sharding.mesh("data=2", devices=3),
        lambda: lx.sharding.mesh("data=2", devices=[]),
    ],
)
def test_arguments_of_other_types_are_refused(call):
    with pytest.raises(lx.LeptonError):
        call()
