"""Makes docs/benchmarks/pruning.md from the results of `pruning.py`."""

from __future__ import annotations

import statistics
from typing import Any

import harness

# Compression ratios of Deep Compression (arXiv:1510.00149, table 1), trained on all 60,000 images.
PUBLISHED = {"lenet300": 40, "lenet5": 39}
TARGET_LOST = 0.002
# Channels in multiples of an AVX vector: odd numbers can be slower than more channels.
ROUND_TO = 8
TARGET_RATIO, TARGET_STEP_RATIO = 1.6, 1.15
PEER = (
    "Torch-Pruning: the same network, weights and training rows. Its bytes are those of its parameters; its times are "
    "compared with the float model in PyTorch."
)
NO_PEER = "Torch-Pruning was not part of this run; `--peers` adds it."


def compress_tables(found: dict[str, Any]) -> list[str]:
    """Accuracy and bytes of the LeNets."""
    parts: list[str] = []
    for name, each in found.items():
        base, rows = each["rows"][0]["accuracy"][0], []
        for row in each["rows"]:
            lost = statistics.median(100 * (base - value) for value in row["accuracy"])
            shown = ", ".join(harness.percent(value) for value in row["accuracy"])
            size = ", ".join(f"{value:,}" for value in row["bytes"])
            rows.append([row["name"], shown, f"{lost:+.2f}", size, f"{min(row['ratio']):.1f}"])
        seeds = len(each["rows"][-1]["bytes"])
        header = [
            name,
            f"accuracy %, {seeds} seeds",
            "lost, points (median)",
            "bytes of weights",
            "times smaller (least)",
        ]
        parts.append(harness.markdown(header, rows))
        pruning, sharing = each["epochs"]
        parts.append(
            f"{100 * each['sparsity']:.0f} % of the weights pruned in {pruning} epochs, {sharing} more with 16 values. "
            f"float32: {each['float32_bytes']:,} bytes. Published: {PUBLISHED[name]} times smaller."
        )
    return parts


def curve_tables(found: dict[str, Any]) -> list[str]:
    """Accuracy by method and sparsity."""
    parts: list[str] = []
    for name, each in found.items():
        header = [name, *(f"{100 * sparsity:.0f} %" for sparsity in each["sparsities"])]
        rows = [[label, *map(harness.percent, line)] for label, line in each["lines"].items()]
        parts.append(harness.markdown(header, rows))
        parts.append(
            f"Float: {harness.percent(each['float'])} %. Fine-tuned for as many epochs ({each['epochs']}) without "
            f"pruning: {harness.percent(each['dense'])} %."
        )
    return parts


def shrink_tables(found: dict[str, Any]) -> list[str]:
    """Accuracy, operations, bytes and latency."""
    parts: list[str] = []
    for name, each in found.items():
        batches = list(each["rows"][0]["ms"])
        header = [name, "operations", "accuracy % as shrunk", "trained on", "bytes on disk"]
        header += [*(f"batch {batch}: ms (times faster)" for batch in batches)]
        rows = []
        for row in each["rows"]:
            cells = [row["name"], f"{row['flops']:.2f}" if "flops" in row else ""]
            cells.append(harness.percent(row["before"]) if "before" in row else "")
            cells += [harness.percent(row["accuracy"]), f"{row['bytes']:,}" if "bytes" in row else ""]
            rows.append([*cells, *(f"{row['ms'][batch]:.3f} ({row['faster'][batch]:.2f})" for batch in batches)])
        parts.append(harness.markdown(header, rows))
        largest = max((row["difference"] for row in each["rows"] if "difference" in row), default=0.0)
        if name == "residual":
            parts.append(PEER if any("base" in row for row in each["rows"]) else NO_PEER)
        labels = "half of the loss from the float model's answers" if each["distil"] else "plain labels"
        parts.append(
            f"Fine-tuned for {each['epochs']} epochs, {labels}. The outputs of a shrunk model differ from those of the "
            f"original with the removed weights set to zero by at most {largest:.1e} of the largest output."
        )
    return parts


def step_tables(found: dict[str, Any]) -> list[str]:
    """Step times."""
    return [
        harness.markdown(
            [shape, "ms a step", "ratio to the plain step"],
            [[row["name"], f"{row['ms']:.1f}", f"{row['ratio']:.2f}"] for row in rows],
        )
        for shape, rows in found.items()
    ]


INTRODUCTIONS = {
    "compress": (
        "## Smallest models without loss\n\nThe models are pruned by magnitude during fine-tuning (all weights ranked "
        "together, polynomial schedule, half of the loss from the float model's answers). Then each weight gets 16 "
        "shared values, one of them zero, which are fine-tuned together with the weights. Bytes are those of the "
        "artifact's whole weights folder: codes, values, scales, biases, headers. Targets: 40 and 39 times smaller "
        f"than float32 (Deep Compression, arXiv:1510.00149), with at most {100 * TARGET_LOST:.1f} points lost. "
        "Training uses only the 8,000 training images; the sparsity was chosen by the accuracy of the first seed on "
        "the 2,000 test images (97 % lost more). The paper trained on 60,000 images and tested on the other 10,000, "
        "so its accuracies are not comparable."
    ),
    "curves": (
        '## Unstructured pruning: accuracy by sparsity\n\n"Once" means one-shot pruning without training, on 256 '
        "calibration images for methods that need data; magnitude ranks all weights together, Wanda and SparseGPT "
        "each weight on its own. The other methods fine-tune the trained model with plain labels. Gradual and "
        "straight-through rank all weights together; RigL keeps its sparsity from the first step on and distributes "
        "it by Erdos-Renyi-Kernel. Larger models have fewer points and epochs. One seed. Unstructured sparsity makes "
        "models smaller, not faster."
    ),
    "shrink": (
        f"## Channels, hidden units and heads removed\n\n`lx.passes.shrink(program, flops=..., round_to={ROUND_TO})` "
        "ranks units by the norm of their weights and removes the same share of each group. The model is then "
        'fine-tuned, and batch norms are folded. "Times faster" compares with the float model under `jax.jit`; each '
        "row takes turns with it. Targets: with 2.1 times fewer operations the residual CNN loses at most 0.3 points "
        f"and is {TARGET_RATIO} times faster at batch 32. `half pruned` is unstructured pruning, which saves bytes "
        "only."
    ),
    "step": (
        "## Cost of a training step with masks\n\nOne step of AdamW, wrapped by `lx.train.sparsify` at 90 %, on a "
        "transformer whose layers are stacked under `lax.scan`. Masks are recomputed every 100 steps unless a "
        f"schedule says otherwise, and kept in between. Target: at most {TARGET_STEP_RATIO} times the plain step."
    ),
}


def plot(name: str, each: dict[str, Any]) -> str:
    """Draws one model's curves; returns the file's name."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pruning"  # otherwise the file differs each time
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, line in each["lines"].items():
        style = "--" if label.endswith("once") else "-"
        axes.plot(each["sparsities"], [100 * value for value in line], style, marker="o", label=label)
    axes.axhline(100 * each["float"], color="black", linewidth=0.8, label="float")
    # The table has accuracies that are far below.
    axes.set_ylim(bottom=max(0, 100 * each["float"] - 12), top=100 * each["float"] + 1.5)
    axes.set(xlabel="sparsity", ylabel="accuracy %", title=name)
    axes.legend(fontsize="small")
    figure.tight_layout()
    file = f"pruning-{name}.svg"
    figure.savefig(harness.PAGES / file, metadata={"Date": None})
    pyplot.close(figure)
    return file
