"""Features tapped from inside of models, against the same values returned by the models themselves, in NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_xla as lx
from lepton_xla.errors import TrainingError
from lepton_xla.train import Features, Logits, distill

KEY = jax.random.key(0)
ROWS, POSITIONS, CLASSES = 4, 3, 5


def array(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


# A residual network with scopes, plain JAX. Each layer's hidden values are computed once more by `hidden`.
def network(width, layers, seed, *, named=True):
    weights = {f"layer_{k}": {"up": array(width, width, seed=seed + k, scale=width**-0.5)} for k in range(layers)}
    weights["head"] = array(width, CLASSES, seed=seed + 50)
    weights["embed"] = array(6, width, seed=seed + 60)

    def scope(name):
        return jax.named_scope(name if named else "net")

    def fn(w, x):
        h = x @ w["embed"]
        for k in range(layers):
            with scope(f"layer_{k}"):
                h = h + jnp.tanh(h @ w[f"layer_{k}"]["up"])
        with scope("head"):
            return h.mean(1) @ w["head"]

    return lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", POSITIONS, 6), "float32")})


def hidden(program, x):
    """The values after each layer, the first entry before all, float64."""
    w = {path: np.asarray(leaf, np.float64) for path, leaf in program.weights.items()}
    values = [np.asarray(x, np.float64) @ w["embed"]]
    for k in range(len(w) - 2):
        values.append(values[-1] + np.tanh(values[-1] @ w[f"layer_{k}/up"]))
    return values


FIRST = -0.1758902
STUDENT, TEACHER, WIDE = network(8, 2, 1), network(8, 4, 10), network(12, 4, 20)
BATCH = {"x": array(ROWS, POSITIONS, 6, seed=7)}


def value_of(loss, batch=BATCH, weights=None):
    weights = {**loss.student.weights, **loss.extra_weights} if weights is None else weights
    return loss(weights, batch, KEY, {})


def test_scopes_of_any_layers_are_compared():
    """Layer 0 with the teacher's layer 1, and layer 1 with layer 3: any map will do."""
    loss = distill(STUDENT, TEACHER, [Features({"layer_0": "layer_1", "layer_1": "layer_3"}), Logits(weight=0.5)])
    value, metrics, _ = value_of(loss)
    own, theirs = hidden(STUDENT, BATCH["x"]), hidden(TEACHER, BATCH["x"])
    expected = np.mean([((own[s] - theirs[t]) ** 2).mean() for s, t in ((1, 2), (2, 4))])
    np.testing.assert_allclose(metrics["features"], expected, rtol=1e-5)
    np.testing.assert_allclose(value, metrics["features"] + 0.5 * metrics["logits"], rtol=1e-6)
    assert not loss.extra_weights


def test_gradients_flow_through_the_student_alone():
    loss = distill(STUDENT, TEACHER, [Features({"layer_0": "layer_1"})])

    def by_hand(weights):
        h = BATCH["x"] @ weights["embed"]
        h = h + jnp.tanh(h @ weights["layer_0/up"])
        return jnp.mean((h - jnp.asarray(hidden(TEACHER, BATCH["x"])[2], jnp.float32)) ** 2)

    def total(weights, arrays):
        return loss.bind(arrays)(weights, BATCH, KEY, {})[0]

    grads, of_teacher = jax.jit(jax.grad(total, (0, 1)))(STUDENT.weights, loss.arrays)
    expected = jax.grad(by_hand)(STUDENT.weights)
    for path, leaf in expected.items():
        np.testing.assert_allclose(grads[path], leaf, rtol=1e-4, atol=1e-7)
    assert np.any(grads["layer_0/up"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher))


def test_sites_are_tapped_at_both_ends():
    """Without scopes, a site's input is the value after the layer before it."""
    student, teacher = network(8, 2, 1, named=False), network(8, 4, 10, named=False)
    own, theirs = hidden(student, BATCH["x"]), hidden(teacher, BATCH["x"])
    value, _, _ = value_of(distill(student, teacher, [Features({"layer_1/up:input": "layer_3/up:input"})]))
    np.testing.assert_allclose(value, ((own[1] - theirs[3]) ** 2).mean(), rtol=1e-5)
    value, _, _ = value_of(distill(student, teacher, [Features({"layer_1/up": "layer_3/up"})]))
    products = [
        values[at] @ np.asarray(program.weights[f"layer_{at}/up"], np.float64)
        for program, values, at in ((student, own, 1), (teacher, theirs, 3))
    ]
    np.testing.assert_allclose(value, ((products[0] - products[1]) ** 2).mean(), rtol=1e-5)


def test_cosine():
    value, _, _ = value_of(distill(STUDENT, TEACHER, [Features({"layer_1": "layer_3"}, "cosine")]))
    s, t = hidden(STUDENT, BATCH["x"])[2], hidden(TEACHER, BATCH["x"])[4]
    cosine = (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
    np.testing.assert_allclose(value, (1 - cosine).mean(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_other_widths_are_projected_by_a_learned_matrix(kind):
    pairs = {"layer_0": "layer_1", "layer_1": "layer_3"}
    loss = distill(STUDENT, WIDE, [Features(pairs, kind)])
    assert {path: leaf.shape for path, leaf in loss.extra_weights.items()} == {
        "distill/layer_0->layer_1/kernel": (8, 12),
        "distill/layer_1->layer_3/kernel": (8, 12),
    }
    own, theirs = hidden(STUDENT, BATCH["x"]), hidden(WIDE, BATCH["x"])
    expected = []
    for kernel, (s, t) in zip(loss.extra_weights.values(), ((1, 2), (2, 4)), strict=True):
        made = own[s] @ np.asarray(kernel, np.float64)
        cosine = (made * theirs[t]).sum(-1) / np.linalg.norm(made, axis=-1) / np.linalg.norm(theirs[t], axis=-1)
        expected.append(((made - theirs[t]) ** 2).mean() if kind == "mse" else (1 - cosine).mean())
    np.testing.assert_allclose(value_of(loss)[0], np.mean(expected), rtol=1e-5)
    again = distill(STUDENT, WIDE, [Features(pairs, kind)])
    np.testing.assert_array_equal(*(one.extra_weights["distill/layer_0->layer_1/kernel"] for one in (loss, again)))
    # The same in every process, so that several begin alike.
    np.testing.assert_allclose(loss.extra_weights["distill/layer_0->layer_1/kernel"][0, 0], FIRST, rtol=1e-5)
    weights = {**STUDENT.weights, **loss.extra_weights}
    grads = jax.grad(lambda weights: value_of(loss, weights=weights)[0])(weights)
    assert all(np.any(grads[path]) for path in loss.extra_weights)
    with pytest.raises(TrainingError, match="the student's 'layer_0' has width 8, the teacher's 'layer_1' 12"):
        distill(STUDENT, WIDE, [Features(pairs, kind, projection=False)])


def test_positions_that_a_mask_excludes_do_not_count():
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    batch = {**BATCH, "mask": jnp.asarray(mask, bool)}
    loss = distill(STUDENT, TEACHER, [Features({"layer_1": "layer_3"}, mask="mask")])
    each = ((hidden(STUDENT, BATCH["x"])[2] - hidden(TEACHER, BATCH["x"])[4]) ** 2).mean(-1)
    np.testing.assert_allclose(value_of(loss, batch)[0], (each * mask).sum() / mask.sum(), rtol=1e-5)


def distances(x):
    found = np.linalg.norm(x[:, None] - x[None], axis=-1)
    return found / found[~np.eye(len(x), dtype=bool)].mean()


def huber(difference):
    size = np.abs(difference)
    return np.where(size <= 1, size**2 / 2, size - 0.5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["distance", "angle"])
def test_relations_between_rows(kind, masked):
    """Widths differ, and no projection is needed."""
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    batch = {**BATCH, "mask": jnp.asarray(mask)} if masked else BATCH
    loss = distill(STUDENT, WIDE, [Features({"layer_1": "layer_3"}, kind, mask="mask" if masked else None)])
    assert not loss.extra_weights
    values = [hidden(program, BATCH["x"])[at] for program, at in ((STUDENT, 2), (WIDE, 4))]
    if masked:
        values = [(one * mask[..., None])[:3] for one in values]
    s, t = (one.reshape(len(one), -1) for one in values)
    if kind == "distance":
        other = ~np.eye(len(s), dtype=bool)
        expected = huber(distances(s) - distances(t))[other].mean()
    else:
        terms = []
        for j in range(len(s)):
            for i in range(len(s)):
                for k in range(len(s)):
                    if i != j and k != j:
                        angle = [
                            (x[i] - x[j]) @ (x[k] - x[j]) / np.linalg.norm(x[i] - x[j]) / np.linalg.norm(x[k] - x[j])
                            for x in (s, t)
                        ]
                        terms.append(huber(angle[0] - angle[1]))
        expected = np.mean(terms)
    np.testing.assert_allclose(value_of(loss, batch)[0], expected, rtol=1e-4)
    weights = {**STUDENT.weights, **loss.extra_weights}
    grads = jax.grad(lambda weights: value_of(loss, batch, weights)[0])(weights)
    assert all(np.isfinite(leaf).all() for leaf in grads.values())


def test_equal_rows_have_finite_gradients():
    batch = {"x": jnp.tile(BATCH["x"][:1], (ROWS, 1, 1))}
    for kind in ("distance", "angle", "cosine"):
        loss = distill(STUDENT, TEACHER, [Features({"layer_1": "layer_3"}, kind)])
        grads = jax.grad(lambda weights: value_of(loss, batch, weights)[0])(STUDENT.weights)  # noqa: B023
        assert all(np.isfinite(leaf).all() for leaf in grads.values())


class Layer(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, mask=None, *, train: bool = False):
        attended = nn.MultiHeadDotProductAttention(
            self.heads, dropout_rate=0.3, deterministic=not train, name="attention"
        )(x, x, mask=mask)
        return nn.LayerNorm(name="norm")(x + nn.relu(nn.Dense(x.shape[-1], name="dense")(attended)))


class Encoder(nn.Module):
    width: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Dense(self.width, name="embed")(x)
        for k in range(self.layers):
            x = Layer(self.heads, name=f"layer_{k}")(x, train=train)
        return nn.Dense(CLASSES, name="head")(x.mean(1))


class Stacked(nn.Module):
    """The layers as one stack under `nn.scan`, rematerialized."""

    width: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        def body(layer, x, _):
            return layer(x, train=train), None

        x = nn.Dense(self.width, name="embed")(x)
        scan = nn.scan(
            nn.remat(body),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.layers,
        )
        x, _ = scan(Layer(self.heads, name="layers"), x, None)
        return nn.Dense(CLASSES, name="head")(x.mean(1))


INPUTS = {"x": lx.TensorSpec(("batch", POSITIONS, 6), "float32")}


def encoder(kind, layers, heads=2, seed=0, width=8):
    module = kind(width, layers, heads)
    return module, module.init(jax.random.key(seed), jnp.ones((1, POSITIONS, 6)))


def stacked_like(variables, layers):
    """The variables of `Encoder`, for `Stacked`."""
    params = dict(variables["params"])
    each = [params.pop(f"layer_{k}") for k in range(layers)]
    return {"params": {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)}}


def inside(module, variables, path):
    """What Flax itself captures of a module: its output."""
    keep = lambda found, _: "/".join(found.path) == path  # noqa: E731
    _, state = module.apply(variables, BATCH["x"], capture_intermediates=keep)
    leaf = state["intermediates"]
    for part in (*path.split("/"), "__call__"):
        leaf = leaf[part]
    return np.asarray(leaf[0], np.float64)


def test_modules_of_linen_are_scopes():
    student, teacher = encoder(Encoder, 2, seed=1), encoder(Encoder, 4, seed=2)
    programs = [lx.from_linen(*one, INPUTS) for one in (student, teacher)]
    for own, other in (("layer_0", "layer_1"), ("layer_1/attention", "layer_3/attention"), ("layer_0/norm", "layer_2")):
        loss = distill(*programs, [Features({own: other})])
        expected = ((inside(*student, own) - inside(*teacher, other)) ** 2).mean()
        np.testing.assert_allclose(value_of(loss)[0], expected, rtol=1e-4)


def test_steps_of_a_scan_are_layers_too():
    """A stacked teacher, rematerialized, gives what the same teacher gives unrolled; and so does a stacked student."""
    teacher, student = encoder(Encoder, 4, seed=2), encoder(Encoder, 2, seed=1)
    unrolled = [lx.from_linen(*one, INPUTS) for one in (student, teacher)]
    stacked = [
        lx.from_linen(Stacked(8, layers, 2), stacked_like(one[1], layers), INPUTS)
        for one, layers in ((student, 2), (teacher, 4))
    ]
    pairs = {"layer_0": "layer_1", "layer_1": "layer_3"}
    plain = distill(*unrolled, [Features(pairs), Features(pairs, "attention")])
    scanned = {"layers[0]": "layers[1]", "layers[-1]": "layers[3]"}
    deep = distill(*stacked, [Features(scanned), Features(scanned, "attention")])
    for own, other in ((value_of(plain)[1], value_of(deep)[1]),):
        np.testing.assert_allclose(own["features"], other["features"], rtol=1e-5)
        np.testing.assert_allclose(own["features_1"], other["features_1"], rtol=1e-4)
    grads = [
        jax.jit(jax.grad(lambda w, loss=loss: value_of(loss, weights=w)[0]))(loss.student.weights)
        for loss in (plain, deep)
    ]
    for k in range(2):
        np.testing.assert_allclose(
            grads[0][f"params/layer_{k}/dense/kernel"], grads[1]["params/layers/dense/kernel"][k], rtol=1e-3, atol=1e-6
        )
    by_site = distill(*stacked, [Features({"params/layers/dense/kernel[1]": "params/layers/dense/kernel[3]"})])
    by_path = distill(*unrolled, [Features({"params/layer_1/dense/kernel": "params/layer_3/dense/kernel"})])
    np.testing.assert_allclose(value_of(by_site)[0], value_of(by_path)[0], rtol=1e-5)
    for name, message in (
        ("layers", r"'layers' is in a scan of 4 steps; name one, such as 'layers\[0\]'"),
        ("layers[4]", r"'layers\[4\]' is in a scan of 4 steps"),
        ("head[0]", r"'head\[0\]' is in no scan; name 'head'"),
    ):
        with pytest.raises(TrainingError, match=message):
            distill(*stacked, [Features({"layers[0]": name})])


def test_a_scan_is_tapped_as_a_whole_and_inside():
    def network(layers, seed):
        def fn(w, x):
            def step(h, w):
                with jax.named_scope("cell"):
                    return jnp.tanh(h @ w), None

            with jax.named_scope("stack"):
                h, _ = jax.lax.scan(step, x @ w["embed"], w["layers"])
            return h.mean(1) @ w["head"]

        weights = {"embed": array(6, 8, seed=seed), "layers": array(layers, 8, 8, seed=seed + 1)}
        return lx.trace(fn, {**weights, "head": array(8, CLASSES, seed=seed + 2)}, INPUTS)

    def values(program):
        w = {path: np.asarray(leaf, np.float64) for path, leaf in program.weights.items()}
        found = [np.asarray(BATCH["x"], np.float64) @ w["embed"]]
        for layer in w["layers"]:
            found.append(np.tanh(found[-1] @ layer))
        return found

    student, teacher = network(2, 1), network(4, 5)
    own, theirs = values(student), values(teacher)
    for pairs, both in (
        ({"stack": "stack"}, [(2, 4)]),
        ({"stack": "stack", "layers:input[1]": "layers:input[3]"}, [(2, 4), (1, 3)]),
        ({"layers:input[-1]": "stack"}, [(1, 4)]),
        ({"stack": "stack", "cell[0]": "stack/cell[2]"}, [(2, 4), (1, 3)]),
    ):
        value, _, _ = value_of(distill(student, teacher, [Features(pairs)]))
        expected = np.mean([((own[s] - theirs[t]) ** 2).mean() for s, t in both])
        np.testing.assert_allclose(value, expected, rtol=1e-4)


def probabilities(module, variables, layer):
    """Attention of a layer, from Flax's own query and key projections: [rows, heads, queries, keys]."""
    query, key = (inside(module, variables, f"{layer}/attention/{name}") for name in ("query", "key"))
    return softmax(np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1]))


@pytest.mark.parametrize("heads", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_attentions_are_compared_as_distributions(heads):
    student, teacher = encoder(Encoder, 2, seed=1), encoder(Encoder, 4, heads, seed=2)
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]])
    programs = [lx.from_linen(*one, INPUTS) for one in (student, teacher)]
    s, t = (probabilities(*one, layer) for one, layer in ((student, "layer_1"), (teacher, "layer_3")))
    if heads != 2:
        s, t = s.mean(1, keepdims=True), t.mean(1, keepdims=True)
    each = (t * np.log(t / s)).sum(-1).mean(1)
    loss = distill(*programs, [Features({"layer_1": "layer_3"}, "attention")])
    np.testing.assert_allclose(value_of(loss)[0], each.mean(), rtol=1e-3)
    loss = distill(*programs, [Features({"layer_1": "#3"}, "attention", mask="mask")])
    value = value_of(loss, {**BATCH, "mask": jnp.asarray(mask)})[0]
    np.testing.assert_allclose(value, (each * mask).sum() / mask.sum(), rtol=1e-3)
    for name, message in (
        ("Encoder", "Encoder has 4 attentions; name one, Encoder#0 to Encoder#3"),
        ("Encoder#4", "has 4 attentions"),
        ("head", "there is no attention in 'head'"),
        ("layer_9", "has no site or scope 'layer_9'"),
    ):
        with pytest.raises(TrainingError, match=message):
            distill(*programs, [Features({"layer_1": name}, "attention")])


def test_jaxs_own_attention_is_one():
    """`jax.nn.dot_product_attention` has other axes, and its softmax is before a transposed product."""

    def fn(w, x):
        q, k, v = (jnp.einsum("btc,chd->bthd", x, w[name]) for name in "qkv")
        return jax.nn.dot_product_attention(q, k, v).reshape(*x.shape[:2], -1).mean(1)

    programs = [
        lx.trace(fn, {name: array(6, 2, 4, seed=seed + at) for at, name in enumerate("qkv")}, INPUTS) for seed in (1, 5)
    ]
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1]])
    own = []
    for program in programs:
        q, k = (np.einsum("btc,chd->bthd", BATCH["x"], program.weights[name]) for name in "qk")
        own.append(softmax(np.einsum("bqhd,bkhd->bhqk", q, k, dtype=np.float64) / 2))
    loss = distill(*programs, [Features({"#0": "#0"}, "attention", mask="mask")])
    value = value_of(loss, {**BATCH, "mask": jnp.asarray(mask)})[0]
    each = (own[1] * np.log(own[1] / own[0])).sum(-1).mean(1)
    np.testing.assert_allclose(value, (each * mask).sum() / mask.sum(), rtol=1e-4)


def test_a_student_in_training_mode_is_tapped_where_it_drops_out():
    module, variables = encoder(Encoder, 2, seed=1)
    model = lx.train.from_linen(module, variables, INPUTS)
    teacher = lx.from_linen(*encoder(Encoder, 4, seed=2), INPUTS)
    loss = distill(model, teacher, [Features({"layer_1": "layer_3"}), Features({"layer_0": "layer_1"}, "attention")])
    runs = [loss(model.weights, BATCH, jax.random.key(seed), {})[1] for seed in (0, 0, 1)]
    assert runs[0]["features"] == runs[1]["features"] != runs[2]["features"]
    # Dropout comes after softmax, so the first layer's probabilities are the same.
    np.testing.assert_allclose(runs[0]["features_1"], runs[2]["features_1"], rtol=1e-6)
    assert 0 < float(runs[0]["features_1"]) < 5


def test_modules_of_nnx_are_tapped_by_site():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.last = nnx.Linear(8, CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x.mean(1)))))

    student = lx.train.from_nnx(Net(nnx.Rngs(1)), INPUTS)
    teacher = lx.from_nnx(Net(nnx.Rngs(2)), INPUTS)
    loss = distill(student, teacher, [Features({"last/kernel:input": "last/kernel:input"})])
    value, _, state = loss(student.weights, BATCH, KEY, student.state)
    x = np.asarray(BATCH["x"], np.float64).mean(1)
    found = []
    for weights in (student.weights, teacher.weights):
        h = x @ np.asarray(weights["first/kernel"], np.float64)
        mean, var = (h.mean(0), h.var(0)) if weights is student.weights else (0, 1)
        found.append(np.maximum((h - mean) / np.sqrt(var + 1e-5), 0))
    np.testing.assert_allclose(value, ((found[0] - found[1]) ** 2).mean(), rtol=1e-4)
    assert not np.array_equal(state["norm/mean"], student.state["norm/mean"])


def test_a_quantized_teacher_is_tapped_by_scope():
    small = lx.optimize(WIDE, lx.Recipe.load("int8").replace({"measure": False}), buckets={"batch": (ROWS,)})
    values = [value_of(distill(STUDENT, one, [Features({"layer_1": "layer_3"})]))[0] for one in (WIDE, small)]
    assert values[0] != values[1]
    np.testing.assert_allclose(values[0], values[1], rtol=0.05)


def test_the_student_is_computed_as_before():
    """Tapping changes no bit of a model's outputs, and calls it once."""
    loss = distill(STUDENT, TEACHER, [Logits(), Features({"layer_0": "layer_1"}, weight=0.0)])
    plain = distill(STUDENT, TEACHER, [Logits()])
    run = lambda loss: jax.jit(lambda w: loss(w, BATCH, KEY, {})[0])  # noqa: E731
    np.testing.assert_array_equal(run(loss)(STUDENT.weights), run(plain)(STUDENT.weights))
    count = lambda loss: str(jax.make_jaxpr(lambda w: loss(w, BATCH, KEY, {})[0])(STUDENT.weights)).count("tanh")  # noqa: E731
    assert count(loss) == count(plain) == 6


def test_several_teachers():
    taps = {"layer_0": "layer_1"}
    both = [WIDE, TEACHER]
    _, metrics, _ = value_of(distill(STUDENT, both, [Logits(), Features(taps, teacher=1)]))
    alone = value_of(distill(STUDENT, TEACHER, [Features(taps)]))[0]
    np.testing.assert_allclose(metrics["features"], alone, rtol=1e-6)
    with pytest.raises(TrainingError, match="there are 2 teachers; give the index of one"):
        distill(STUDENT, both, [Features(taps)])
    with pytest.raises(TrainingError, match="teacher = 2, but there are 2"):
        distill(STUDENT, both, [Features(taps, teacher=2)])


def test_stored_answers_have_no_features(tmp_path):
    data = [{"id": np.arange(ROWS), "x": np.asarray(BATCH["x"])}]
    answers = lx.train.teach(TEACHER, data, tmp_path / "answers", top_k=CLASSES)
    with pytest.raises(TrainingError, match="stored answers have no values from inside of the teacher"):
        distill(STUDENT, answers, [Features({"layer_0": "layer_1"})])


def test_values_that_cannot_leave_a_container_are_refused():
    def looped(w, x):
        def body(k, h):
            with jax.named_scope("inner"):
                return jnp.tanh(h @ w["inner"])

        n = jnp.int32(x[0, 0, 0])  # a length that is not known makes it a while loop
        return jax.lax.fori_loop(0, n, body, x.mean(1)) @ w["head"]

    teacher = lx.trace(looped, {"inner": array(6, 6), "head": array(6, CLASSES)}, INPUTS)
    for name in ("inner", "inner:input"):
        with pytest.raises(TrainingError, match=f"the teacher: '{name}' is inside a `while`, which no value can leave"):
            distill(STUDENT, teacher, [Features({"layer_0": name})])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"layer_7": "layer_1"}, "the student has no site or scope 'layer_7'; it has 'layer_1"),
        ({"layer_0": "nothing"}, "the teacher has no site or scope 'nothing'"),
        ({"head": "layer_1"}, r"the student's 'head' has shape \(.*\), the teacher's 'layer_1'"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_named(pairs, message):
    with pytest.raises(TrainingError, match=message):
        distill(STUDENT, TEACHER, [Features(pairs)])


def test_a_scope_that_is_named_twice_needs_more_of_its_name():
    def fn(w, x):
        for part in ("left", "right"):
            with jax.named_scope(part), jax.named_scope("block"):
                x = jnp.tanh(x @ w[f"to_{part}"])
        return x.mean(1)

    program = lx.trace(fn, {"to_left": array(6, 6), "to_right": array(6, 6, seed=1)}, INPUTS)
    with pytest.raises(TrainingError, match="'block' may be 'left/block' or 'right/block'; give more of its name"):
        distill(program, program, [Features({"block": "left/block"})])
    assert float(value_of(distill(program, program, [Features({"left/block": "left"})]))[0]) == 0


def test_the_last_value_of_a_scope_that_is_used_is_its_output():
    """Not one of a scope whose name begins alike, nor one that only the scope itself uses."""

    def fn(w, x):
        with jax.named_scope("layer_1"):
            first, second = jnp.split(x @ w["one"], 2, -1)
        with jax.named_scope("layer_10"):
            x = jnp.tanh(first) + second
            unused = x * 2
        return jnp.where(jnp.isnan(unused).any(), x, x + 1).mean(1)

    program = lx.trace(fn, {"one": array(6, 12)}, INPUTS)
    second = np.split(np.asarray(BATCH["x"], np.float64) @ np.asarray(program.weights["one"], np.float64), 2, -1)[1]
    teacher = lx.trace(lambda w, x: (x @ w["zero"]).mean(1), {"zero": jnp.zeros((6, 6))}, INPUTS)
    value = value_of(distill(program, teacher, [Features({"layer_1": "zero"})]))[0]
    np.testing.assert_allclose(value, (second**2).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Features({}), r"pairs = \{\}; expected names"),
        (lambda: Features("layer_0"), "pairs = 'layer_0'"),
        (lambda: Features({"a": "b"}, "l2"), "kind = 'l2'; expected mse, cosine, attention, distance, angle"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(TrainingError, match=message):
        make()


def test_projections_are_trained_with_the_student():
    """After training, the projected values of the student are nearly the teacher's."""
    loss = distill(STUDENT, WIDE, [Features({"layer_1": "layer_3"})])
    weights = {**STUDENT.weights, **loss.extra_weights}
    optimizer = optax.sgd(0.1)

    def one(carry, _):
        weights, moments = carry
        value, grads = jax.value_and_grad(lambda weights: value_of(loss, weights=weights)[0])(weights)
        updates, moments = optimizer.update(grads, moments, weights)
        return (optax.apply_updates(weights, updates), moments), value

    _, values = jax.lax.scan(one, (weights, optimizer.init(weights)), length=300)
    assert values[-1] < 0.2 * values[0]
