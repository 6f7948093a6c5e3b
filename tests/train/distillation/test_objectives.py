"""Losses of distillation, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_xla as lx
from lepton_xla.errors import ModelError, TrainingError
from lepton_xla.train import Labels, Logits, Model, distill

ROWS, WIDTH, CLASSES = 6, 5, 4
KEY = jax.random.key(0)


def array(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)


def linear(seed=0, classes=CLASSES, name="x", scale=1.0, width=WIDTH):
    inputs = {name: lx.TensorSpec(("batch", width), "float32")}
    return lx.trace(lambda w, x: x @ w["w"], {"w": array(width, classes, seed=seed, scale=scale)}, inputs)


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def exact(value):
    return np.asarray(value, np.float64)


def divergence(student, chances, temperature):
    """T^2 KL(p || q), one a row."""
    return temperature**2 * (chances * (np.log(chances) - np.log(softmax(student / temperature)))).sum(-1)


BATCH = {"x": array(ROWS, WIDTH, seed=9), "label": jnp.arange(ROWS) % CLASSES}
STUDENT, TEACHER = linear(1), linear(2, scale=2.0)


def logits_of(program, batch=BATCH):
    return exact(batch["x"]) @ exact(program.weights["w"])


@pytest.mark.parametrize("temperature", [1, 2.0, 7.5])
def test_logits_are_compared_as_hinton_does(temperature):
    loss = distill(STUDENT, TEACHER, [Logits(temperature, weight=0.7)])
    value, metrics, state = loss(STUDENT.weights, BATCH, KEY, {})
    rows = divergence(logits_of(STUDENT), softmax(logits_of(TEACHER) / temperature), temperature)
    np.testing.assert_allclose(metrics["logits"], rows.mean(), rtol=2e-6)
    np.testing.assert_allclose(value, 0.7 * rows.mean(), rtol=2e-6)
    assert value.dtype == jnp.float32
    assert state == {}


def test_the_default_is_logits_alone():
    value, metrics, _ = distill(STUDENT, TEACHER)(STUDENT.weights, BATCH, KEY, {})
    assert list(metrics) == ["logits"]
    rows = divergence(logits_of(STUDENT), softmax(logits_of(TEACHER) / 2), 2)
    np.testing.assert_allclose(value, rows.mean(), rtol=2e-6)


def test_gradients_are_those_of_the_textbook_and_none_reach_the_teacher():
    """d(T^2 KL)/dz = T (q - p) a row; so the size of gradients hardly depends on T."""
    temperature = 3.0
    loss = distill(STUDENT, TEACHER, [Logits(temperature)])

    def total(weights, arrays):
        return loss.bind(arrays)(weights, BATCH, KEY, {})[0]

    grads, of_teacher = jax.grad(total, (0, 1))(STUDENT.weights, loss.arrays)
    soft = [softmax(logits_of(program) / temperature) for program in (STUDENT, TEACHER)]
    expected = exact(BATCH["x"]).T @ (temperature * (soft[0] - soft[1]) / ROWS)
    np.testing.assert_allclose(grads["w"], expected, rtol=1e-4, atol=1e-6)
    assert not np.any(of_teacher[0]["w"])


def test_losses_are_added_with_their_weights():
    loss = distill(STUDENT, TEACHER, [Logits(2.0, weight=0.9), Labels(weight=0.25)])
    value, metrics, _ = loss(STUDENT.weights, BATCH, KEY, {})
    own, labels = logits_of(STUDENT), np.asarray(BATCH["label"])
    soft = divergence(own, softmax(logits_of(TEACHER) / 2), 2).mean()
    hard = -np.log(softmax(own))[np.arange(ROWS), labels].mean()
    np.testing.assert_allclose(value, 0.9 * soft + 0.25 * hard, rtol=2e-6)
    np.testing.assert_allclose(metrics["labels"], hard, rtol=2e-6)
    np.testing.assert_allclose(metrics["accuracy"], (own.argmax(-1) == labels).mean())


def test_labels_may_be_probabilities():
    chances = softmax(exact(array(ROWS, CLASSES, seed=5)))
    batch = {**BATCH, "soft": jnp.asarray(chances, jnp.float32)}
    value, _, _ = distill(STUDENT, TEACHER, [Labels(label="soft")])(STUDENT.weights, batch, KEY, {})
    np.testing.assert_allclose(value, -(chances * np.log(softmax(logits_of(STUDENT)))).sum(-1).mean(), rtol=2e-6)


def test_teachers_vote_with_their_probabilities():
    others = [linear(seed, scale=2.0) for seed in (2, 3, 4)]
    value, _, _ = distill(STUDENT, others, [Logits(2.0)])(STUDENT.weights, BATCH, KEY, {})
    chances = np.mean([softmax(logits_of(teacher) / 2) for teacher in others], 0)
    np.testing.assert_allclose(value, divergence(logits_of(STUDENT), chances, 2).mean(), rtol=2e-6)


def test_weights_of_losses_follow_the_step():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    loss = distill(STUDENT, TEACHER, [Logits(weight=schedule), Labels(weight=0.5)])
    at = lambda step: loss(STUDENT.weights, BATCH, KEY, {}, step=jnp.int32(step))  # noqa: E731
    _, metrics, _ = at(0)
    for step, weight in ((0, 1.0), (4, 0.6), (10, 0.0)):
        np.testing.assert_allclose(at(step)[0], weight * metrics["logits"] + 0.5 * metrics["labels"], rtol=1e-6)
    with pytest.raises(TrainingError, match="Logits: its weight is a function of the step"):
        loss(STUDENT.weights, BATCH, KEY, {})


def test_rows_that_a_mask_excludes_do_not_count_even_if_they_are_not_numbers():
    mask = jnp.array([1, 1, 0, 1, 0, 1])
    batch = {**BATCH, "counts": mask, "x": BATCH["x"].at[2].set(jnp.nan)}
    loss = distill(STUDENT, TEACHER, [Logits(2.0, mask="counts"), Labels(mask="counts")])
    value, _, _ = loss(STUDENT.weights, batch, KEY, {})
    kept = np.flatnonzero(mask)
    few = {name: leaf[kept] for name, leaf in BATCH.items()}
    np.testing.assert_allclose(value, loss(STUDENT.weights, {**few, "counts": mask[kept]}, KEY, {})[0], rtol=1e-6)
    none = {**BATCH, "counts": jnp.zeros(ROWS, jnp.int32)}
    assert float(loss(STUDENT.weights, none, KEY, {})[0]) == 0
    with pytest.raises(TrainingError, match=r"the mask of Logits has shape \(3,\)"):
        loss(STUDENT.weights, {**BATCH, "counts": jnp.ones(3)}, KEY, {})


def test_positions_are_masked_in_token_models():
    positions = 3
    inputs = {"x": lx.TensorSpec(("batch", positions, WIDTH), "float32")}
    student, teacher = (lx.trace(lambda w, x: x @ w["w"], {"w": array(WIDTH, 4, seed=s)}, inputs) for s in (1, 2))
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    batch = {"x": array(2, positions, WIDTH), "mask": jnp.asarray(mask)}
    value, _, _ = distill(student, teacher, [Logits(2.0, mask="mask")])(student.weights, batch, KEY, {})
    rows = divergence(logits_of(student, batch), softmax(logits_of(teacher, batch) / 2), 2)
    np.testing.assert_allclose(value, (rows * mask).sum() / mask.sum(), rtol=2e-6)


def test_classes_that_the_teacher_excludes_do_not_count():
    closed = np.array([[0, 0, -np.inf, 0]], np.float32)
    inputs = {"x": lx.TensorSpec(("batch", WIDTH), "float32")}
    teacher = lx.trace(lambda w, x: x @ w["w"] + closed, TEACHER.weights, inputs)
    loss = distill(STUDENT, teacher, [Logits(1.0)])
    value, grads = jax.value_and_grad(lambda weights: loss(weights, BATCH, KEY, {})[0])(STUDENT.weights)
    chances = softmax(logits_of(TEACHER) + closed)
    terms = np.where(chances > 0, chances * np.log(np.where(chances > 0, chances, 1) / softmax(logits_of(STUDENT))), 0)
    np.testing.assert_allclose(value, terms.sum(-1).mean(), rtol=2e-6)
    assert np.isfinite(grads["w"]).all()


def test_outputs_are_chosen_by_name():
    inputs = {"x": lx.TensorSpec(("batch", WIDTH), "float32")}
    two = lambda w, x: {"logits": x @ w["w"], "hidden": x}  # noqa: E731
    student, teacher = (lx.trace(two, {"w": array(WIDTH, CLASSES, seed=s)}, inputs) for s in (1, 2))
    named = distill(student, teacher, [Logits(output="logits")])(student.weights, BATCH, KEY, {})[0]
    plain = distill(linear(1), linear(2))(student.weights, BATCH, KEY, {})[0]
    np.testing.assert_allclose(named, plain, rtol=1e-6)
    mixed = distill(student, linear(2), [Logits(output="logits")])(student.weights, BATCH, KEY, {})[0]
    np.testing.assert_allclose(mixed, plain, rtol=1e-6)
    with pytest.raises(TrainingError, match=r"the student has the outputs .*; name one"):
        distill(student, teacher)
    with pytest.raises(TrainingError, match="the teacher has no output 'logit'; its outputs are"):
        distill(student, teacher, [Logits(output="logits", teacher_output="logit")])


def test_a_student_in_training_mode_draws_and_writes_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(WIDTH, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.last = nnx.Linear(8, CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(self.norm(self.first(x))))

    model = lx.train.from_nnx(Net(nnx.Rngs(0)), {"x": lx.TensorSpec(("batch", WIDTH), "float32")})
    loss = distill(model, TEACHER)
    runs = [loss(model.weights, BATCH, jax.random.key(seed), model.state) for seed in (0, 0, 1)]
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert not np.array_equal(runs[0][2]["norm/mean"], model.state["norm/mean"])


def test_an_int8_teacher_teaches_almost_the_same():
    width = 64
    student, teacher = linear(1, width=width), linear(2, width=width)
    small = lx.optimize(teacher, lx.Recipe.load("int8"), buckets={"batch": (ROWS,)})
    batch = {"x": array(ROWS, width, seed=3)}
    values = [distill(student, one)(student.weights, batch, KEY, {})[0] for one in (teacher, small)]
    assert values[0] != values[1]
    np.testing.assert_allclose(values[0], values[1], rtol=0.05)


def test_the_teachers_weights_are_arguments_of_the_step():
    loss = distill(STUDENT, TEACHER)

    def step(weights, arrays):
        return loss.bind(arrays)(weights, BATCH, KEY, {})[0]

    jitted = jax.jit(step)
    others = ({"w": 3 * TEACHER.weights["w"]},)
    assert jitted(STUDENT.weights, loss.arrays) != jitted(STUDENT.weights, others)
    np.testing.assert_allclose(jitted(STUDENT.weights, loss.arrays), step(STUDENT.weights, loss.arrays), rtol=1e-6)
    assert jitted._cache_size() == 1


def test_a_teacher_computes_in_its_own_dtype_in_a_loop_that_casts():
    """Batches and the student's weights in bfloat16; only the teacher's inputs were rounded."""
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, tree)  # noqa: E731
    value, _, _ = distill(STUDENT, TEACHER)(half(STUDENT.weights), half(BATCH), KEY, {})
    rounded = {**BATCH, "x": half(BATCH)["x"].astype(jnp.float32)}
    own = half(BATCH["x"]) @ half(STUDENT.weights["w"])
    rows = divergence(exact(own), softmax(logits_of(TEACHER, rounded) / 2), 2)
    np.testing.assert_allclose(value, rows.mean(), rtol=1e-5)
    assert value.dtype == jnp.float32


def test_a_student_learns_what_the_teacher_knows():
    """No labels: after training, the student's probabilities are the teacher's."""
    loss = distill(STUDENT, TEACHER, [Logits(2.0)])
    optimizer = optax.sgd(0.5)

    def one(carry, _):
        weights, moments = carry
        grads = jax.grad(lambda weights: loss(weights, BATCH, KEY, {})[0])(weights)
        updates, moments = optimizer.update(grads, moments, weights)
        return (optax.apply_updates(weights, updates), moments), None

    (trained, _), _ = jax.lax.scan(one, (STUDENT.weights, optimizer.init(STUDENT.weights)), length=2000)
    found = softmax(exact(BATCH["x"]) @ exact(trained["w"]))
    np.testing.assert_allclose(found, softmax(logits_of(TEACHER)), atol=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Logits(0.0), r"Logits: temperature = 0.0; expected a number above 0"),
        (lambda: Logits(float("nan")), "temperature = nan"),
        (lambda: Logits(True), "temperature = True"),
        (lambda: Labels(weight=-1.0), r"Labels: weight = -1.0; expected a number of at least 0"),
        (lambda: Labels(weight="high"), "weight = 'high'"),
        (
            lambda: distill(STUDENT, None),
            "the teacher is a NoneType; expected a Program, several in a list, or Answers",
        ),
        (lambda: distill(STUDENT, []), "the teacher is a list of nothing"),
        (lambda: distill(STUDENT, [TEACHER, 3]), "the teacher is a list of Program, int"),
        (lambda: distill(STUDENT, TEACHER, []), "losses is a list of nothing"),
        (lambda: distill(STUDENT, TEACHER, Logits()), "losses is a Logits; expected a list"),
        (
            lambda: distill(STUDENT, linear(2, classes=7)),
            r"the teacher's output 'output' is float32\[batch, 7\], the student's 'output' is float32\[batch, 4\]",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(TrainingError, match=message):
        make()


def test_a_student_that_cannot_be_trained_is_refused():
    with pytest.raises(ModelError, match=r"expected a train\.Model or a Program"):
        distill("student", TEACHER)


@pytest.mark.parametrize(
    ("batch", "losses", "message"),
    [
        ({"x": BATCH["x"]}, [Labels()], "the batch has no entry 'label'; it has 'x'"),
        ({"label": BATCH["label"]}, [Logits()], "the batch has no entry 'x'"),
        (BATCH, [Logits(mask="m")], "the batch has no entry 'm'"),
        ({**BATCH, "label": BATCH["label"][:3]}, [Labels()], r"the labels 'label' are int32\[3\]; logits of \[6, 4\]"),
    ],
)
def test_what_a_batch_lacks_is_named(batch, losses, message):
    with pytest.raises(TrainingError, match=message):
        distill(STUDENT, TEACHER, losses)(STUDENT.weights, batch, KEY, {})


def test_a_teacher_may_take_other_inputs():
    teacher = linear(2, name="raw")
    loss = distill(STUDENT, teacher)
    value = loss(STUDENT.weights, {**BATCH, "raw": BATCH["x"]}, KEY, {})[0]
    np.testing.assert_allclose(value, distill(STUDENT, linear(2))(STUDENT.weights, BATCH, KEY, {})[0], rtol=1e-6)
    with pytest.raises(TrainingError, match="the batch has no entry 'raw'"):
        loss(STUDENT.weights, BATCH, KEY, {})


def test_a_model_is_taken_as_well_as_a_program():
    loss = distill(Model.of(STUDENT), TEACHER)
    np.testing.assert_array_equal(
        loss(STUDENT.weights, BATCH, KEY, {})[0], distill(STUDENT, TEACHER)(STUDENT.weights, BATCH, KEY, {})[0]
    )
