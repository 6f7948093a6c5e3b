"""The same decoder in other libraries: Hugging Face transformers on PyTorch, ONNX Runtime GenAI, OpenVINO GenAI.

transformers runs GPT-2's own shape. The other two get a Llama with as many weights in its layers and the same table,
exported by their own tools from random weights, once for a folder. OpenVINO computes in float32 where it is called so;
with int8 and int4 weights it rounds activations to int8 too, which is its default.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

PACKAGES = ("torch", "transformers", "onnxruntime-genai", "openvino-genai")
_FORMATS = {"float32": "fp32", "int8": "int8", "int4": "int4"}


class Shape(Protocol):
    """Sizes of the decoder."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    capacity: int
    tokens: int


def calls(shape: Shape, prompts: np.ndarray, rows: Sequence[int], folder: pathlib.Path) -> dict[str, Callable[[], Any]]:
    """Greedy decoding of `rows` prompts at once by each library that is installed, by `NAME ROWS`."""
    if not _installed("torch", "transformers"):
        return {}
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    made: dict[str, Callable[[int], Any]] = {"transformers on PyTorch, float32": _transformers(shape, prompts)}
    if _installed("onnxruntime_genai", "onnx_ir") or _installed("openvino_genai", "optimum.intel"):
        _once(folder / "llama", lambda path: _save_llama(shape, path))
    for name, short in _FORMATS.items():
        if _installed("onnxruntime_genai", "onnx_ir"):
            made[f"ONNX Runtime GenAI, {name}"] = _onnxruntime(shape, prompts, folder, short)
        if _installed("openvino_genai", "optimum.intel"):
            made[f"OpenVINO GenAI, {name}"] = _openvino(shape, prompts, folder, short)
    return {f"{name} {count}": functools.partial(call, count) for name, call in made.items() for count in rows}


def _installed(*names: str) -> bool:
    try:
        return all(importlib.util.find_spec(name) for name in names)
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def _transformers(shape: Shape, prompts: np.ndarray) -> Callable[[int], Any]:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    config = transformers.GPT2Config(
        vocab_size=shape.vocabulary, n_positions=shape.capacity, n_embd=shape.width, n_layer=shape.layers,
        n_head=shape.heads, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()

    def call(rows: int) -> Any:
        with torch.inference_mode():
            ids = torch.tensor(prompts[:rows])
            options = {"max_new_tokens": shape.tokens, "min_new_tokens": shape.tokens, "do_sample": False}
            return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)

    return call


def _save_llama(shape: Shape, path: pathlib.Path) -> None:
    """A Llama has three matrices where GPT-2's layers have two: two thirds of the width are as many weights."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.width * 8 // 3,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=shape.capacity, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)


def _once(path: pathlib.Path, make: Callable[[pathlib.Path], object]) -> None:
    """Make a folder unless it is there; one that was broken off is made anew."""
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(path)


def _export(path: pathlib.Path, command: Callable[[str], Sequence[str]]) -> None:
    def make(part: pathlib.Path) -> None:
        done = subprocess.run([sys.executable, "-m", *command(str(part))], check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{path.name}: {done.stderr[-2000:]}")

    _once(path, make)


def _onnxruntime(shape: Shape, prompts: np.ndarray, folder: pathlib.Path, short: str) -> Callable[[int], Any]:
    path, model_of = folder / f"onnxruntime-{short}", ("-i", str(folder / "llama"), "-p", short, "-e", "cpu")
    _export(path, lambda out: ("onnxruntime_genai.models.builder", *model_of, "-o", out))
    library: Any = importlib.import_module("onnxruntime_genai")
    model = library.Model(str(path))

    def call(rows: int) -> None:
        length = prompts.shape[1] + shape.tokens
        options = library.GeneratorParams(model)
        options.set_search_options(max_length=length, min_length=length, batch_size=rows, do_sample=False)
        generator = library.Generator(model, options)
        generator.append_tokens(prompts[:rows].astype(np.int32))
        for _ in range(shape.tokens):
            generator.generate_next_token()

    return call


def _openvino(shape: Shape, prompts: np.ndarray, folder: pathlib.Path, short: str) -> Callable[[int], Any]:
    path = folder / f"openvino-{short}"
    task = ("--task", "text-generation-with-past", "--library", "transformers", "--weight-format", short)
    start = ("optimum.commands.optimum_cli", "export", "openvino", "-m", str(folder / "llama"))
    _export(path, lambda out: (*start, *task, out))
    library: Any = importlib.import_module("openvino_genai")
    tensor: Any = importlib.import_module("openvino").Tensor
    exact = {"INFERENCE_PRECISION_HINT": "f32"} if short == "fp32" else {}
    pipeline = library.LLMPipeline(str(path), "CPU", **exact)
    config = library.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = shape.tokens
    config.ignore_eos, config.do_sample = True, False

    def call(rows: int) -> Any:
        ids = prompts[:rows].astype(np.int64)
        return pipeline.generate(library.TokenizedInputs(tensor(ids), tensor(np.ones_like(ids))), config)

    return call
