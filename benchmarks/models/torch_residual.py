"""The residual CNN in PyTorch with the same weights, shrunk by Torch-Pruning and trained on as ours is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch
import torch_pruning
from torch import nn
from torch.nn import functional

from models.base import BenchModel, cached
from models.residual import BLOCKS, WIDTHS
from models.sparse import BATCH, Task

BASE = "PyTorch float"
_CHECK_TOLERANCE = 1e-3
_SEARCH_STEPS = 8


class _Normed(nn.Module):
    """A convolution padded as XLA's SAME is, and a batch norm."""

    def __init__(self, inputs: int, features: int, window: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, features, window, stride, bias=False)
        self.norm = nn.BatchNorm2d(features, eps=1e-5, momentum=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (window, _), (stride, _) = self.conv.kernel_size, self.conv.stride
        size = x.shape[-1]
        total = max((-(-size // stride) - 1) * stride + window - size, 0)
        if total:
            x = functional.pad(x, (total // 2, total - total // 2) * 2)
        return self.norm(self.conv(x))


class _Block(nn.Module):
    def __init__(self, inputs: int, features: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _Normed(inputs, features, 3, stride), _Normed(features, features, 3, 1)
        self.shortcut = _Normed(inputs, features, 1, stride) if stride > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x)))
        return torch.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _Normed(1, WIDTHS[0], 3, 2)
        inputs, blocks = WIDTHS[0], []
        for stage, features in enumerate(WIDTHS):
            for block in range(BLOCKS):
                blocks.append(_Block(inputs, features, 2 if stage and not block else 1))
                inputs = features
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(inputs, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def rows(
    model: BenchModel, task: Task, epochs: int, shares: Sequence[float], round_to: int
) -> Iterator[tuple[dict[str, Any], Callable[[Any], Callable[[], Any]]]]:
    """Rows of the float network and of each share of its operations, and `call(inputs)` for each.

    Args:
        epochs: of training after shrinking.
        shares: what is left of the operations.
        round_to: channels in multiples of this.
    """
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    whole = _loaded(model.linen[1])
    example = torch.zeros(1, 1, 28, 28)
    expected = jax.jit(task.program.fn)(task.program.weights, task.images[:64])
    difference = np.abs(_predict(whole, task.images[:64]) - np.asarray(expected)).max()
    assert difference < _CHECK_TOLERANCE * np.abs(expected).max(), f"PyTorch's answers differ by {difference}"
    before = torch_pruning.utils.count_ops_and_params(whole, example)[0]
    yield _row(BASE, model, whole, flops=1.0), _timed(whole)
    for share in shares:
        small, left = _pruned(model.linen[1], example, before, share, round_to)
        as_is = _accuracy(model, small)
        state = small.state_dict()
        found = cached(
            f"torch-residual-{len(task.images)}-{share:.3f}-{round_to}-{epochs}",
            lambda small=small: _train(small, task, epochs),
            {name: value.numpy() for name, value in state.items()},
        )
        small.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in found.items()})
        yield _row(f"Torch-Pruning to {100 * share:.0f} %", model, small, flops=left, before=as_is), _timed(small)


def _loaded(variables: Any) -> _Net:
    """The network with Flax's weights."""
    params, stats = variables["params"], variables["batch_stats"]
    net = _Net().eval()
    order = [net.stem]
    for block in net.blocks:
        order += [block.first, block.second, *([block.shortcut] if block.shortcut is not None else [])]
    for index, part in enumerate(order):
        name = f"_Normed_{index}"
        norm, found = params[name]["BatchNorm_0"], stats[name]["BatchNorm_0"]
        kernel = np.asarray(params[name]["Conv_0"]["kernel"]).transpose(3, 2, 0, 1)
        part.conv.weight.data = torch.tensor(kernel)
        for target, value in (
            (part.norm.weight, norm["scale"]),
            (part.norm.bias, norm["bias"]),
            (part.norm.running_mean, found["mean"]),
            (part.norm.running_var, found["var"]),
        ):
            target.data = torch.tensor(np.asarray(value))
    net.head.weight.data = torch.tensor(np.asarray(params["Dense_0"]["kernel"]).T.copy())
    net.head.bias.data = torch.tensor(np.asarray(params["Dense_0"]["bias"]))
    return net


def _pruned(variables: Any, example: torch.Tensor, before: float, share: float, round_to: int) -> tuple[_Net, float]:
    """The network with the fewest channels removed that leaves at most this share of its operations."""

    def at(ratio: float) -> tuple[_Net, float]:
        net = _loaded(variables)
        pruner = torch_pruning.pruner.BasePruner(
            net,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            round_to=round_to,
            ignored_layers=[net.head],
        )
        pruner.step()
        return net, torch_pruning.utils.count_ops_and_params(net, example)[0] / before

    low, high = 0.0, 0.9
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)[1] <= share else (middle, high)
    return at(high)


def _train(net: _Net, task: Task, epochs: int) -> dict[str, np.ndarray]:
    """As `residual.trained_on`: the same rows in the same order."""
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps(epochs))
    random = np.random.default_rng(0)
    net.train()
    for _ in range(epochs):
        order = random.permutation(len(task.images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            picked = order[start : start + BATCH]
            moved = np.roll(task.images[picked], tuple(random.integers(-2, 3, 2)), axis=(1, 2))
            image, label = _channels_first(moved), torch.tensor(task.labels[picked], dtype=torch.long)
            loss = functional.cross_entropy(net(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    return {name: value.numpy() for name, value in net.state_dict().items()}


def _channels_first(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(np.moveaxis(image, 3, 1)))


def _predict(net: _Net, image: Any) -> np.ndarray:
    with torch.inference_mode():
        return net(_channels_first(image)).numpy()


def _accuracy(model: BenchModel, net: _Net) -> float:
    assert model.spec.evaluate is not None
    return model.spec.evaluate(lambda image: {"output": _predict(net, image)})["accuracy"]


def _row(name: str, model: BenchModel, net: _Net, **more: Any) -> dict[str, Any]:
    size = sum(part.numel() * part.element_size() for part in (*net.parameters(), *net.buffers()))
    return {"name": name, "base": BASE, "accuracy": _accuracy(model, net), "bytes": size} | more


def _timed(net: _Net) -> Callable[[Any], Callable[[], Any]]:
    def call(inputs: Any) -> Callable[[], Any]:
        image = _channels_first(inputs["image"])

        def run() -> Any:
            with torch.inference_mode():
                return net(image)

        return run

    return call
