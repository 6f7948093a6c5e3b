"""Run by test_sharded_passes with eight devices: no pass, and no program that it makes, gathers a weight.

XLA writes the text of all that it compiles into a folder (`--xla_dump_to`), so what a pass compiles is seen too.
"""

import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # LLVM's, which move nothing

import lepton_xla as lx  # noqa: E402

FOLDER = pathlib.Path(sys.argv[1])
ROWS = 8
random = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(random.standard_normal(shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1), jnp.float32)


# Half of the smallest weight, and of a stack; activations have 8 rows, so they are smaller.
LEAST, LEAST_STACK = 64 * 48 // 2, 3 * 64 * 96 // 2
GRAMS = {(64, 64), (96, 96), (128, 128)}
seen = set()


def moved():
    """What was moved since the last call: `{operation: [shape, ...]}`."""
    found = {}
    for path in FOLDER.glob("*after_optimizations.txt"):
        if path in seen:
            continue
        seen.add(path)
        for shapes, name in re.findall(
            r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(",
            path.read_text(),
        ):
            each = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", shapes)]
            found.setdefault(name, []).extend(each or [()])
    return found


def check(what):
    """Fail if a weight was gathered since the last call. The Gram matrix of a layer's inputs is no weight."""
    gathered = [shape for shape in moved().get("all-gather", []) if is_weight(shape)]
    assert not gathered, f"{what}: {gathered}"


def is_weight(shape):
    least = LEAST_STACK if shape[:1] == (3,) else LEAST
    return math.prod(shape) >= least and tuple(size for size in shape if size > 1)[-2:] not in GRAMS


def spread(program):
    """How many bytes of weights a device holds, as a share of all."""
    leaves = jax.tree.leaves(program.weights)
    mine = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return mine / sum(leaf.nbytes for leaf in leaves)


def network(w, x):
    x = x + jax.nn.relu(x @ w["a/up"] + w["a/bias"]) @ w["a/down"]
    x, _ = jax.lax.scan(lambda x, l: (jnp.tanh(jnp.tanh(x @ l[0]) @ l[1]), None), x, (w["s/up"], w["s/down"]))  # noqa: E741
    return x @ w["out"]


WEIGHTS = {
    "a/up": array(64, 128), "a/bias": array(1, 128), "a/down": array(128, 64),
    "s/up": array(3, 64, 96), "s/down": array(3, 96, 64), "out": array(64, 48),
}  # fmt: skip
TENSOR_PARALLEL = lx.sharding.Rules(
    [
        ("a/up|out", (None, "model")),
        ("a/bias", (None, "model")),
        ("a/down", ("model",)),
        ("s/up", (None, None, "model")),
        ("s/down", (None, "model")),
    ]
)
MESH = lx.sharding.mesh("data=2,model=4")
program = lx.trace(network, WEIGHTS, {"x": lx.TensorSpec(("batch", 64), "float32")})
placement = TENSOR_PARALLEL.resolve(program, MESH)
sharded = program.replace(weights=placement.put(WEIGHTS))
X = np.asarray(random.standard_normal((ROWS, 64)), np.float32)
DATA = [{"x": X}, {"x": X + np.float32(1)}]
QUANTIZE = '[[quantize]]\nsites = ".*"\n'
PRUNE = '[[prune]]\nsites = ".*"\nsparsity = 0.5\n'


def optimized(name, toml, program=program, sharded=sharded, tolerance=1e-5):
    """Optimize on one and on eight devices; compare the outputs."""
    recipe = lx.Recipe.parse(toml, name=name)
    inputs = {key: spec.at({"batch": ROWS}).shape for key, spec in program.inputs.items()}
    x = np.asarray(random.standard_normal(inputs["x"]), np.float32)
    data = DATA if program.symbols and len(x.shape) == 2 else None
    options = {"buckets": {"batch": (ROWS,)}, "calibration": data}
    alone = lx.optimize(program, recipe, **options)
    wanted = np.asarray(jax.jit(alone.fn)(alone.weights, x))
    moved()
    small = lx.optimize(sharded, recipe, **options)
    check(f"the pass {name}")
    rows = jax.device_put(x, jax.NamedSharding(MESH, jax.P("data")))
    got = np.asarray(jax.jit(small.fn)(small.weights, rows))
    check(f"the program of {name}")
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance, err_msg=name)
    assert spread(small) < 0.35, f"{name}: a device holds {spread(small):.2f} of the weights"


def image_network(w, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, w["k1"], (1, 1), "SAME", dimension_numbers=numbers)
    x = (x - w["mean"]) * jax.lax.rsqrt(w["var"] + jnp.float32(1e-5)) * w["scale"] + w["shift"]
    x = jax.nn.relu(jax.lax.conv_general_dilated(jax.nn.relu(x), w["k2"], (1, 1), "SAME", dimension_numbers=numbers))
    return x.mean((1, 2))


def images():
    weights = {"k1": array(3, 3, 8, 32), "k2": array(3, 3, 32, 64)}
    weights |= {name: jnp.abs(array(1, 1, 1, 32)) + jnp.float32(1) for name in ("mean", "var", "scale", "shift")}
    # Its activations are as large as its weights, so only passes are looked at, and k2 is cut over input channels.
    rules = lx.sharding.Rules([("k1|mean|var|scale|shift", (*[None] * 3, "model")), ("k2", (None, None, "model"))])
    program = lx.trace(image_network, weights, {"x": lx.TensorSpec(("batch", 2, 2, 8), "float32")})
    return program, program.replace(weights=rules.resolve(program, MESH).put(weights))


def plan(toml):
    return lx.passes.resolve(lx.Recipe.parse(toml, name="plan"), program)


def operations(place, wrap, optimizer=None, masks=None):
    """How often each collective occurs in a train step."""
    optimizer = optimizer or optax.sgd(1e-3, momentum=0.9)
    weights = place.put(WEIGHTS)
    rows = {name: jax.device_put(value, place.batch) for name, value in (("x", X), ("y", X[:, :48]))}
    masks = {path: jax.device_put(mask, place.shardings[path]) for path, mask in (masks or {}).items()}

    def step(weights, state, batch, masks):
        loss = lambda weights: jnp.mean((wrap(masks)(weights, batch["x"]) - batch["y"]) ** 2)  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    moved()
    with jax.set_mesh(place.mesh):
        jax.jit(step).lower(weights, optimizer.init(weights), rows, masks).compile()
    return moved()


def train_steps(*, quick):
    """Compare a train step's collectives with those of float; `quick` leaves out all but two passes on one mesh."""
    dynamic, static = plan(QUANTIZE), plan(QUANTIZE + "dynamic = false\n")
    ranges = lx.passes.calibrate(sharded, static, DATA)
    check("calibrate")
    pruned = lx.passes.prune(program, plan(PRUNE)).masks
    parallel = lx.sharding.Rules().resolve(program, lx.sharding.mesh("data=8"))
    wraps = {
        "fake_quant": lambda _: lx.passes.fake_quant(network, dynamic),
        "fake_quant, static": lambda _: lx.passes.fake_quant(network, static, ranges),
        "masked": lambda masks: lx.passes.masked(network, masks),
    }
    if quick:
        del wraps["fake_quant, static"]
    for place in (placement,) if quick else (parallel, placement):
        float_step = operations(place, lambda _: network)
        counts = {name: len(shapes) for name, shapes in float_step.items()}
        assert set(counts) == {"all-reduce"}, counts
        for name, wrap in wraps.items():
            found = operations(place, wrap, masks=pruned if name == "masked" else None)
            more = list(found["all-reduce"])
            for shape in float_step["all-reduce"]:
                if shape in more:
                    more.remove(shape)
            # Where the contracted dimension is cut, an absmax scale is a maximum over devices: one row a site.
            allowed = {(1, 64), (ROWS // 2,)} if place is placement and name != "masked" else set()
            assert set(found) == {"all-reduce"}, f"{name}: {found}"
            assert set(more) <= allowed, f"{name} on {dict(place.mesh.shape)} adds {more}"
        if quick:
            continue
        pruning = lx.train.sparsify(
            optax.sgd(1e-3, momentum=0.9), plan(PRUNE), schedule=lx.train.polynomial(0, 10, every=2)
        )
        found = operations(place, lambda _: network, pruning)
        # Thresholds are found by counts, of which each is a scalar or one for each step of a stack.
        assert {shape for shape in found["all-reduce"] if shape not in float_step["all-reduce"]} <= {(), (3,)}


def gathered_bytes(wrap):
    """Bytes that all-gathers of a train step with FSDP bring to a device."""
    place = lx.sharding.Rules(fallback="data", fallback_bytes=1000).resolve(program, lx.sharding.mesh("data=8"))
    x, y = (jax.ShapeDtypeStruct((512, width), jnp.float32, sharding=place.batch) for width in (64, 48))
    loss = lambda weights, x, y: jnp.mean((wrap(weights, x) - y) ** 2)  # noqa: E731
    text = jax.jit(jax.grad(loss)).lower(place.put(WEIGHTS), x, y).compile().as_text()
    found = re.findall(r"= (\w)\d+\[([\d,]+)\]\S* all-gather\(", text)
    assert found
    return sum(math.prod(map(int, dims.split(","))) * (4 if kind == "f" else 1) for kind, dims in found)


QUICK = {"int8": QUANTIZE}
SLOW = {
    "prune": PRUNE + 'distribution = "global"\n',
    "static": QUANTIZE + "dynamic = false\ncalibration = 'percentile:99.9'\n",
    "shrink": "[shrink]\nsparsity = 0.5\nround_to = 4\n",
    "int4": QUANTIZE + 'weights = "int4"\nactivations = "none"\ngranularity = "group:16"\nweight_range = "mse"\n',
    "codebook": QUANTIZE + 'weights = "codebook16"\nactivations = "none"\n',
    "fp8": QUANTIZE + 'weights = "fp8_e4m3"\nactivations = "fp8_e4m3"\n',
    "smooth": 'rescale = "smooth:0.5"\n' + QUANTIZE,
    "awq": 'rescale = "awq"\n' + QUANTIZE,
    "gptq": 'rounding = "gptq"\n' + QUANTIZE,
    "bias": "correct_bias = true\n" + QUANTIZE,
    "equalize": "equalize = true\n" + QUANTIZE,
    "cast": 'cast = "bfloat16"\n',
    "wanda": PRUNE + 'method = "wanda"\n',
    "sparsegpt": PRUNE + 'method = "sparsegpt"\n',
}
# Sums over devices have another order; a value that was a tie may be rounded to the next code.
TOLERANCES = {"cast": 5e-2, "sparsegpt": 1e-4, "gptq": 2e-2, "awq": 2e-2, "smooth": 2e-2, "bias": 2e-2}

for name, toml in (QUICK if sys.argv[2] == "quick" else SLOW).items():
    optimized(name, "measure = false\n" + toml, tolerance=TOLERANCES.get(name, 1e-5))
train_steps(quick=sys.argv[2] == "quick")
if sys.argv[2] != "quick":
    share = gathered_bytes(lx.passes.fake_quant(network, plan(QUANTIZE))) / gathered_bytes(network)
    assert share < 0.9, f"with FSDP fake_quant gathers {share:.2f} of the bytes that float gathers"
    optimized("int8, measured", QUANTIZE, tolerance=5e-2)  # float may win on one and not on eight
    program, sharded = images()
    optimized("folded images", "measure = false\n" + QUANTIZE, program, sharded)
sys.stdout.write("nothing gathered")
