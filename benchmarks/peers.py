"""Alternatives to this library on the same weights and calibration data: qwix, ONNX Runtime, OpenVINO.

Each is used if it is installed; `available()` reports which are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from models import BenchModel

from lepton_xla.recipe import QuantizeRule

PACKAGES = ("qwix", "onnxruntime", "openvino", "nncf")
_QTYPES = {
    "int8": "int8",
    "int4": "int4",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "nf4": "nf4",
}
THREADS = os.cpu_count() or 1
# The models that also exist as ONNX graphs.
IN_ONNX = ("minilm", "mobilenetv2", "efficientnet-b0")

type _Layout = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def available() -> dict[str, bool]:
    """Which peers are installed."""
    return {name: importlib.util.find_spec(name) is not None for name in PACKAGES}


@dataclasses.dataclass(frozen=True)
class Peer:
    """A peer's model.

    Attributes:
        name: for tables.
        predict: function for `ModelSpec.evaluate`, any shape.
        at: `at(inputs) -> call`, a function without arguments that runs the model at these inputs' shapes.
        bytes_before: float bytes of the weights that it quantized; 0 if unknown.
        bytes_after: their quantized bytes, scales included.
        note: differences from our setting.
    """

    name: str
    predict: Callable[..., Mapping[str, np.ndarray]]
    at: Callable[[Mapping[str, np.ndarray]], Callable[[], Any]]
    bytes_before: int = 0
    bytes_after: int = 0
    note: str = ""


def qwix_setting(rule: QuantizeRule) -> tuple[str, dict[str, Any]] | None:
    """A rule's name and arguments in qwix; None if qwix has no such setting."""
    act = getattr(rule, "activations", "none")
    if rule.weights not in _QTYPES or (act != "none" and (act not in _QTYPES or not rule.dynamic)):
        return None
    arguments: dict[str, Any] = {"weight_qtype": _QTYPES[rule.weights]}
    name = f"qwix {rule.weights}"
    if rule.granularity.startswith("group:"):
        arguments["tile_size"] = int(rule.granularity.partition(":")[2].removeprefix("~"))
        name += f" g{arguments['tile_size']}"
    elif rule.granularity != "channel":
        return None
    if act == "none":
        return name + " weights", arguments
    return f"{name} x {act}", arguments | {"act_qtype": _QTYPES[act]}


def qwix_ptq(model: BenchModel, name: str, arguments: Mapping[str, Any]) -> Peer:
    """qwix's post-training quantization of every layer, with dynamic activation scales."""
    import qwix
    from flax import traverse_util
    from qwix import PtqProvider, QuantizationRule

    assert model.linen is not None
    module, variables = model.linen
    note = ""
    options = dict(arguments)
    if options.get("act_qtype") != options["weight_qtype"]:
        # qwix refuses convolutions whose operands differ in format.
        options["op_names"] = ("dot_general", "einsum", "dot")
        note = "dense layers only: qwix quantizes no convolution's weights alone" if _has_convolution(variables) else ""
    # `.+` matches named layers, so products with weights; products of two activations are at the top level.
    small = qwix.quantize_model(module, PtqProvider([QuantizationRule(module_path=".+", **options)]))
    batch = next(iter(model.spec.calibration_batches() or ()))
    others = {key: value for key, value in variables.items() if key != "params"}
    given = [batch[key] for key in model.spec.inputs]

    abstract = jax.eval_shape(small.init, jax.random.key(0), *given)["params"]
    params = _quantize_params(qwix.quantize_params, variables["params"], abstract, model.stacked)
    before = after = 0
    plain = traverse_util.flatten_dict(variables["params"])
    for path, leaf in traverse_util.flatten_dict(params).items():
        if type(leaf).__name__ == "WithAux":
            before += plain[path].nbytes
            after += sum(_bytes(part) for part in jax.tree.leaves(leaf))
    run = lambda variables, *inputs: small.apply(variables, *inputs)  # noqa: E731
    jitted = jax.jit(run)
    stored = {"params": params, **others}

    def predict(**inputs: Any) -> dict[str, np.ndarray]:
        return {"output": np.asarray(jitted(stored, *(inputs[key] for key in model.spec.inputs)))}

    def at(inputs: Mapping[str, np.ndarray]) -> Callable[[], Any]:
        arrays = [jax.numpy.asarray(inputs[key]) for key in model.spec.inputs]
        ready = jax.jit(run).lower(stored, *arrays).compile()
        return lambda: jax.block_until_ready(ready(stored, *arrays))

    return Peer(name, predict, at, before, after, note)


def _quantize_params(quantize: Any, params: Any, abstract: Any, stacked: tuple[str, ...]) -> Any:
    """Apply qwix's `quantize_params`, which does not support stacked layers, to one layer at a time."""
    flat = {name: leaf for name, leaf in params.items() if name not in stacked}
    found = quantize(flat, abstract)
    for name in stacked:
        step = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), abstract[name])
        found[name] = jax.vmap(lambda layer, step=step: quantize(layer, step))(params[name])
    return found


def _has_convolution(variables: Any) -> bool:
    return any(leaf.ndim == 4 for leaf in jax.tree.leaves(variables["params"]))


def _bytes(leaf: Any) -> int:
    from lepton_xla.trees import leaf_bytes

    return leaf_bytes(leaf.shape, leaf.dtype)


def onnx_peers(model: BenchModel) -> list[Peer]:
    """A model of `IN_ONNX` in ONNX Runtime and OpenVINO, in float and in int8, each with its own quantizer."""
    import minilm_onnx
    import onnx
    import vision_onnx

    folder = pathlib.Path(tempfile.mkdtemp())
    path = folder / "float.onnx"
    vision = model.name in vision_onnx.NAMES
    made = vision_onnx.build(model.name, model.linen[1]) if vision else minilm_onnx.build(model.spec.weights)
    onnx.save(made, path)

    def laid(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs for the graph: images with channels first."""
        given = {name: inputs[name] for name in model.spec.inputs}
        return {name: np.ascontiguousarray(np.moveaxis(x, 3, 1)) for name, x in given.items()} if vision else given

    batches = [laid(batch) for batch in model.spec.calibration_batches() or ()]
    peers: list[Peer] = []
    if available()["onnxruntime"]:
        peers += _onnxruntime(path, folder, batches if vision else None, laid)
    if available()["openvino"]:
        peers += _openvino(path, batches, laid, transformer=not vision)
    return peers


def _onnxruntime(
    path: pathlib.Path, folder: pathlib.Path, batches: Sequence[Mapping[str, np.ndarray]] | None, laid: _Layout
) -> list[Peer]:
    """Float and int8; with static scales if batches are given, which convolutions need there."""
    import onnxruntime
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quantized, int8 = folder / "int8.onnx", quantization.QuantType.QInt8
    with contextlib.redirect_stdout(io.StringIO()):
        if batches is None:
            quantization.quantize_dynamic(path, quantized, weight_type=int8, per_channel=True)
        else:
            rows = iter(batches)
            reader = type("Reader", (quantization.CalibrationDataReader,), {"get_next": lambda _: next(rows, None)})()
            quant_pre_process(str(path), str(folder / "ready.onnx"), skip_symbolic_shape=True)
            quantization.quantize_static(
                folder / "ready.onnx", quantized, reader, weight_type=int8, activation_type=int8, per_channel=True
            )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    note = f"`quantize_{'dynamic' if batches is None else 'static'}`, per channel"
    peers = []
    for name, file, about in (("ONNX Runtime float32", path, ""), ("ONNX Runtime int8", quantized, note)):
        session = onnxruntime.InferenceSession(file, options)

        def at(inputs: Mapping[str, np.ndarray], session: Any = session) -> Callable[[], Any]:
            given = laid(inputs)
            return lambda: session.run(None, given)

        def predict(session: Any = session, **inputs: Any) -> dict[str, np.ndarray]:
            return {"output": session.run(None, laid(inputs))[0]}

        peers.append(Peer(name, predict, at, note=about))
    return peers


def _openvino(
    path: pathlib.Path, batches: Sequence[Mapping[str, np.ndarray]], laid: _Layout, *, transformer: bool
) -> list[Peer]:
    import openvino

    core = openvino.Core()
    common = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
    float32 = core.read_model(path)
    found = [("OpenVINO float32", float32, {"INFERENCE_PRECISION_HINT": "f32"}, "")]
    if available()["nncf"]:
        import nncf

        settings = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
        with contextlib.redirect_stdout(io.StringIO()):
            small = nncf.quantize(
                core.read_model(path),
                nncf.Dataset([list(batch.values()) for batch in batches]),
                subset_size=len(batches),
                **settings,
            )
        note = f"`nncf.quantize`{', transformer settings' if transformer else ''}: static scales, bias correction"
        found.append(("OpenVINO int8", small, {}, note + ", SmoothQuant" * transformer))
    peers = []
    for name, graph, options, note in found:
        dynamic = core.compile_model(graph, "CPU", common | options).create_infer_request()

        def predict(dynamic: Any = dynamic, **inputs: Any) -> dict[str, np.ndarray]:
            return {"output": next(iter(dynamic.infer(list(laid(inputs).values())).values())).copy()}

        def at(inputs: Mapping[str, np.ndarray], graph: Any = graph, options: Any = options) -> Callable[[], Any]:
            given = list(laid(inputs).values())
            fixed = graph.clone()
            fixed.reshape({port: list(array.shape) for port, array in zip(fixed.inputs, given, strict=True)})
            request = core.compile_model(fixed, "CPU", common | options).create_infer_request()
            return lambda: request.infer(given)

        peers.append(Peer(name, predict, at, note=note))
    return peers
