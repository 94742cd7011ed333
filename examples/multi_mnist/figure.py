# SPDX-License-Identifier: MIT
"""The figure: losses and cosines over time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .report import by_method
from .train import BASELINE, Run

INTERVALS = 20
# From the palette of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"


def save_figure(runs: Sequence[Run], path: Path) -> None:
    """Write a PNG: one column per method, training losses above, cosine of the task gradients below.

    The steps are split into ``INTERVALS`` intervals. A curve shows the mean over seeds of each interval's average; its
    band extends one standard deviation over seeds to each side. Dotted curves repeat those of the plain sum.
    """
    curves = {method: _curves(group) for method, group in by_method(runs).items()}
    _, reference, _ = curves[BASELINE]
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    rows = figure.subplots(2, len(curves), sharex=True, sharey="row")
    for (loss, cosine), (method, (steps, middles, spreads)) in zip(rows.T, curves.items(), strict=True):
        styles = ((loss, BLUE, "Left digit"), (loss, VERMILION, "Right digit"), (cosine, GREEN, "Cosine"))
        for (axes, colour, label), middle, spread in zip(styles, middles, spreads, strict=True):
            axes.fill_between(steps, middle - spread, middle + spread, color=colour, alpha=0.25, linewidth=0)
            axes.plot(steps, middle, color=colour, label=label)
        if method != BASELINE:
            loss.plot(steps, reference[:2].T, "k:", linewidth=1.2, label=[f"{BASELINE}, to compare", None])
            cosine.plot(steps, reference[2], "k:", linewidth=1.2)
        cosine.axhline(0, color="0.5", linewidth=0.8)
        cosine.set_xlabel("Training step")
        loss.set_title(method)
        loss.spines[["top", "right"]].set_visible(False)
        cosine.spines[["top", "right"]].set_visible(False)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    loss, cosine = rows[:, 0]
    loss.set(ylabel="Training loss (nats)", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("")
    cosine.set_ylabel("Cosine of the task gradients\n(below 0: conflict)")
    figure.suptitle("Multi-MNIST: mean over seeds, with a band of one standard deviation to each side")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _curves(group: Sequence[Run]) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Return the intervals' centres, and means and spreads [3, intervals]: left loss, right loss, cosine."""
    values = np.array([[*zip(*run.losses, strict=True), run.cosines] for run in group])
    steps = np.arange(values.shape[-1])
    intervals = np.array_split(steps, min(INTERVALS, len(steps)))
    averages = np.stack([values[..., interval].mean(-1) for interval in intervals], -1)
    return [interval.mean() for interval in intervals], averages.mean(0), averages.std(0, ddof=1)
