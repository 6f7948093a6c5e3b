"""Model files as a user writes them, and what their models compute, in NumPy."""

import numpy as np

IN, HIDDEN, OUT = 16, 64, 4

PLAIN = """
import jax.numpy as jnp
import numpy as np
import lepton_xla as lx

random = np.random.default_rng(5)
weights = {
    "hidden": random.standard_normal((16, 64)).astype(np.float32),
    "head": random.standard_normal((64, 4)).astype(np.float32),
}
data = np.random.default_rng(6).standard_normal((32, 16)).astype(np.float32)


def fn(weights, x):
    return jnp.tanh(x @ weights["hidden"]) @ weights["head"]


def evaluate(predict):
    outputs = predict(x=data)["output"]
    return {"mean": outputs.mean(), "largest": float(outputs.max())}


def make(**changes):
    given = {
        "fn": fn,
        "weights": weights,
        "inputs": {"x": lx.TensorSpec(("batch", 16), "float32")},
        "buckets": {"batch": (1, 4)},
        "calibration": [{"x": data[:8]}, {"x": data[8:16]}],
        "evaluate": evaluate,
    }
    return lx.ModelSpec(**(given | changes))


model = make()
"""

LINEN = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import lepton_xla as lx

print("a model file may print")


class Net(nn.Module):
    @nn.compact
    def __call__(self, image, train: bool = False):
        x = nn.Conv(8, (3, 3), use_bias=False)(image)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


def model():
    inputs = {"image": lx.TensorSpec(("batch", 6, 6, 1), "float32")}
    net = Net()
    return lx.ModelSpec(module=net, weights=net.init(jax.random.key(0), jnp.zeros((1, 6, 6, 1))), inputs=inputs)
"""

# Every choice fixed, so that figures are known beforehand: no timing decides.
INT8 = """
measure = false
[[quantize]]
sites = ".*"
"""

STATIC = INT8 + "dynamic = false\n"


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    return {
        "hidden": random.standard_normal((IN, HIDDEN)).astype(np.float32),
        "head": random.standard_normal((HIDDEN, OUT)).astype(np.float32),
    }


def data() -> np.ndarray:
    return np.random.default_rng(6).standard_normal((32, IN)).astype(np.float32)


def reference(x: np.ndarray) -> np.ndarray:
    """The plain model in float64."""
    arrays = {name: value.astype(np.float64) for name, value in weights().items()}
    return np.tanh(x.astype(np.float64) @ arrays["hidden"]) @ arrays["head"]
