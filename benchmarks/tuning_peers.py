"""Other tools that choose formats, on the residual CNN: qwix by hand, NNCF's accuracy control, ModelOpt's AutoQuantize.

NNCF and ModelOpt get its PyTorch twin, of the same weights and calibration images. Each answers the same test rows, and
is judged as a candidate of `tune` is. Times are shares of what the tool's own runtime takes in float; ModelOpt only
simulates its formats on a CPU, so it has none. What is not installed is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import harness
import models
import numpy as np
import peers

from lepton_xla.tuning.judging import Judge
from lepton_xla.tuning.trials import predictor

_SIZES = (1, 8, 32)
# What is allowed to NNCF, in points, and the mean bits a weight that ModelOpt is asked for.
_DROP, _BITS = 0.5, (8.0, 6.0, 4.8)
type Predict = Callable[..., dict[str, np.ndarray]]


def rows(model: models.BenchModel) -> list[dict[str, Any]]:
    """A row for each tool and setting; none where the model has no twin."""
    if model.name != "residual":
        return []
    program, spec = model.spec.program(), model.spec
    assert spec.evaluate is not None
    judge = Judge(program, spec.evaluate, predictor(program))
    float_bytes = sum(leaf.nbytes for leaf in program.weights.values())
    found: list[dict[str, Any]] = []
    for name, make in (("qwix", _qwix), ("nncf", _nncf), ("modelopt", _modelopt)):
        if importlib.util.find_spec(name) is None:
            continue
        for title, predict, size, latency, note in make(model):
            drop = judge(predict).reported
            found.append(
                {
                    "name": title,
                    "drop": str(drop),
                    "bytes": f"{size:,.0f}",
                    "share": f"{size / float_bytes:.3f}",
                    "latency": "" if latency is None else f"{latency:.2f}",
                    "note": note,
                }
            )
            print(f"    {found[-1]}", flush=True)
    return found


type _Row = tuple[str, Predict, float, float | None, str]


def _qwix(model: models.BenchModel) -> Iterator[_Row]:
    assert model.linen is not None
    module, variables = model.linen
    weights = sum(leaf.nbytes for leaf in model.spec.program().weights.values())
    title = "qwix int8 x int8"  # XLA's CPU compiler refuses its int4 x int4
    peer = peers.qwix_ptq(model, title, {"weight_qtype": "int8", "act_qtype": "int8"})
    plain = lambda inputs: harness.compiled(lambda v, x: module.apply(v, x), variables, inputs["image"])  # noqa: E731
    yield title, peer.predict, weights - peer.bytes_before + peer.bytes_after, _latency(peer.at, plain), "by hand"


def _nncf(model: models.BenchModel) -> Iterator[_Row]:
    import nncf
    import openvino as ov
    import torch

    net = _twin(model)
    whole = ov.convert_model(net, example_input=torch.zeros(2, 1, 28, 28), input=[-1, 1, 28, 28])
    images = np.concatenate([batch["image"] for batch in model.spec.calibration_batches() or ()]).transpose(0, 3, 1, 2)
    data = nncf.Dataset([images[at : at + 1] for at in range(len(images))])
    evaluate: Any = model.spec.evaluate

    def validate(compiled: Any, _rows: Any) -> tuple[float, None]:
        return evaluate(_answers(compiled))["accuracy"], None

    # NNCF asks for the metric of each item of this data; `validate` has rows of its own, so one is enough.
    one = nncf.Dataset([images[:1]])
    small = nncf.quantize_with_accuracy_control(
        whole, data, one, validate, max_drop=_DROP / 100, subset_size=len(images)
    )
    cores = {name: ov.Core().compile_model(each, "CPU") for name, each in (("float", whole), ("small", small))}

    def at(name: str) -> Callable[[Mapping[str, np.ndarray]], Callable[[], Any]]:
        def of(inputs: Mapping[str, np.ndarray]) -> Callable[[], Any]:
            image = inputs["image"].transpose(0, 3, 1, 2)
            return lambda: cores[name](image)

        return of

    constants = sum(node.data.nbytes for node in small.get_ops() if node.get_type_name() == "Constant")
    title = f"NNCF accuracy control, {_DROP} points"
    yield title, _answers(cores["small"]), constants, _latency(at("small"), at("float")), "int8, in OpenVINO"


def _twin(model: models.BenchModel) -> Any:
    """The same network in PyTorch; its file is left as it is, because what it cached depends on that."""
    twin: Any = importlib.import_module("models.torch_residual")
    assert model.linen is not None
    return twin._loaded(model.linen[1])


def _answers(compiled: Any) -> Predict:
    def predict(image: Any) -> dict[str, np.ndarray]:
        return {"output": np.asarray(compiled(np.asarray(image).transpose(0, 3, 1, 2))[0])}

    return predict


def _modelopt(model: models.BenchModel) -> Iterator[_Row]:
    import modelopt.torch.quantization as quantization
    import torch
    from torch.nn import functional

    batches = list(model.spec.calibration_batches() or ())
    images = [torch.tensor(batch["image"].transpose(0, 3, 1, 2)) for batch in batches]
    float_bytes = sum(leaf.nbytes for leaf in model.spec.program().weights.values())
    for bits in _BITS:
        net = _twin(model)
        with torch.no_grad():
            data = [(each, net(each).argmax(-1)) for each in images]
        small, _ = quantization.auto_quantize(
            net,
            constraints={"effective_bits": bits},
            quantization_formats=[quantization.INT8_DEFAULT_CFG, quantization.INT4_BLOCKWISE_WEIGHT_ONLY_CFG],
            data_loader=data,
            forward_step=lambda net, batch: net(batch[0]),
            loss_func=lambda output, batch: functional.cross_entropy(output, batch[1]),
            num_calib_steps=len(data),
            num_score_steps=len(data),
        )
        small.eval()

        def predict(image: Any, net: Any = small) -> dict[str, np.ndarray]:
            with torch.no_grad():
                return {"output": net(torch.tensor(np.asarray(image).transpose(0, 3, 1, 2))).numpy()}

        note = "simulated; bytes are those of its bits"
        yield f"ModelOpt AutoQuantize, {bits} bits", predict, float_bytes * bits / 32, None, note


def _latency(small: Callable[[Any], Callable[[], Any]], whole: Callable[[Any], Callable[[], Any]]) -> float:
    """The time of a call as a share of float's, geometric mean over the buckets."""
    shares: list[float] = []
    for size in _SIZES:
        inputs = {"image": np.random.default_rng(0).random((size, 28, 28, 1), np.float32)}
        times = harness.interleave({"small": small(inputs), "float": whole(inputs)}, rounds=11, seconds=5)
        shares.append(harness.ratio(times, "small", "float"))
    return statistics.geometric_mean(shares)
