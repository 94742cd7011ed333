# SPDX-License-Identifier: MIT
"""The two plots of the README, from stored runs on a GPU."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

# The same file each time; text as text.
pyplot.rcParams.update({"svg.hashsalt": "gradsurgery", "svg.fonttype": "none", "font.size": 9})

SIZES = (28, 80, 300)
"""Of J, in MB."""
BYTES = {"float32": 4, "bfloat16": 2}
LINES = {"gradsurgery": "cuda", "gradsurgery, triton": "triton", "torch.mm + mv": "torch.mm + mv"}
BARS = {
    "sum of losses": "sum of losses",
    "pcgrad, sequential": "gradsurgery",
    "pcgrad, batched": "gradsurgery, batched",
    "pcgrad, representation": "gradsurgery, representation",
    "torchjd PCGrad": "torchjd PCGrad, batched",
    "torchjd PCGrad, one by one": "torchjd PCGrad, one by one",
    "torchjd UPGrad": "torchjd UPGrad",
    "pytorch_optimizer PCGrad": "pytorch_optimizer PCGrad",
}
PARTS = {"forward": "#b8c4d0", "backward": "#7d93a8", "surgery": "#d1495b", "optimizer": "#3c4f63"}


def bandwidth(run: dict[str, Any]) -> Figure:
    """Plot what gram, PCGrad's weights and combine reach of the measured bandwidth, over the size of J."""
    tasks = (2, 8, 32)
    figure, axes = pyplot.subplots(
        len(BYTES), len(tasks), figsize=(9, 5), sharex=True, sharey=True, layout="constrained"
    )
    for line, dtype in zip(axes, BYTES, strict=True):
        for axis, count in zip(line, tasks, strict=True):
            for contender, label in LINES.items():
                points = sorted(
                    (row["tasks"] * row["size"] * BYTES[dtype] / 1e6, 100 / row["x_floor"])
                    for row in run["rows"]
                    if (row["stage"], row["form"], row["dtype"], row["tasks"]) == ("chain", "flat", dtype, count)
                    and row["contender"] == contender
                    and row["x_floor"]
                )
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
            axis.set(title=f"T = {count}, {dtype}", xscale="log", ylim=(0, 105))
            axis.set_xticks(SIZES, [str(size) for size in SIZES])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    figure.supxlabel("J, MB")
    figure.supylabel(f"% of the {run['ceilings']['read GB/s']:,.0f} GB/s that a read takes")
    axes[0][0].legend()
    return figure


def steps(run: dict[str, Any]) -> Figure:
    """Plot the time of whole training steps, by what takes it."""
    measured = [row for row in run["rows"] if row["contender"] in BARS and row["parts_ms"]]
    workloads = list(dict.fromkeys(row["workload"] for row in measured))
    size = (8, 2 * len(workloads))
    figure, axes = pyplot.subplots(len(workloads), 1, figsize=size, layout="constrained", squeeze=False)
    for axis, workload in zip(axes[:, 0], workloads, strict=True):
        rows = {row["contender"]: row for row in measured if row["workload"] == workload}
        shown = [name for name in BARS if name in rows]
        left = [0.0] * len(shown)
        for part, color in PARTS.items():
            width = [rows[name]["parts_ms"][part] for name in shown]
            axis.barh([BARS[name] for name in shown], width, left=left, color=color, label=part)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axis.invert_yaxis()
        axis.set_title(f"{workload}, {rows[shown[0]]['tasks']} tasks")
    axes[0, 0].legend()
    axes[-1, 0].set_xlabel("ms")
    return figure
