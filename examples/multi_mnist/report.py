# SPDX-License-Identifier: MIT
"""The table of results, and what it does and does not show."""

from collections.abc import Sequence
from statistics import mean, median, stdev

import torch
from rich import box
from rich.table import Table

from .train import BASELINE, BATCH, LEARNING_RATE, TASKS, Run


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each method, one per seed, in the order of their first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


def table(runs: Sequence[Run]) -> Table:
    """Return one row per method: accuracy, time per step, and how the task gradients relate."""
    result = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title="Multi-MNIST: accuracy, time and conflict of each method",
        caption=_caption(runs),
        caption_justify="left",
    )
    result.add_column("\nMethod", no_wrap=True)
    for header in (
        "Left\n%",
        "Right\n%",
        "Fwd+bwd\nms",
        "Surgery\nms",
        "Surgery\n% step",
        "Conflict\n% steps",
        "Cosine\nmean",
    ):
        result.add_column(header, justify="right", no_wrap=True)
    for method, group in by_method(runs).items():
        backward, surgery, step = _step_times(group)
        cosines = [cosine for run in group for cosine in run.cosines]
        result.add_row(
            method,
            *(f"{mean(values):.1f} ± {stdev(values):.1f}" for values in _accuracies(group)),
            f"{1e3 * backward:.2f}",
            "-" if method == BASELINE else f"{1e3 * surgery:.2f}",
            "-" if method == BASELINE else f"{100 * surgery / step:.1f}",
            f"{100 * mean(cosine < 0 for cosine in cosines):.0f}",
            f"{mean(cosines):+.3f}",
        )
    return result


def verdict(runs: Sequence[Run]) -> str:
    """Say which accuracies differ from the plain sum by more than the spread, and what a step costs."""
    groups = by_method(runs)
    baseline = groups.pop(BASELINE)
    differences = []
    for method, group in groups.items():
        for task, ours, theirs in zip(TASKS, _accuracies(group), _accuracies(baseline), strict=True):
            difference = mean(ours) - mean(theirs)
            if abs(difference) > stdev(ours) + stdev(theirs):
                differences.append(f"{method} on the {task} digit ({difference:+.1f} points)")
    rule = "by more than the two standard deviations together"
    if differences:
        accuracy = f"Accuracy differs from the plain sum {rule} only for {', '.join(differences)}."
    else:
        accuracy = f"No method's accuracy differs from the plain sum {rule}: these runs do not tell them apart."
    plain_step = _step_times(baseline)[2]
    times = [_step_times(group) for group in groups.values()]
    ratios = [step / plain_step for _, _, step in times]
    shares = [100 * surgery / step for _, surgery, step in times]
    return (
        f"{accuracy} That is a rule of thumb for {len(baseline)} seeds, not a significance test. "
        f"With surgery the median step took {min(ratios):.2f} to {max(ratios):.2f} times as long as with the "
        "plain sum: surgery takes one backward pass per task (weights of the losses alone one for all), and the "
        "surgery itself is "
        f"{min(shares):.1f} to {max(shares):.1f} % of the step."
    )


def _caption(runs: Sequence[Run]) -> str:
    return (
        f"{len(by_method(runs)[BASELINE])} seeds, {len(runs[0].losses)} steps of {BATCH} pairs, Adam, "
        f"learning rate {LEARNING_RATE:g}; torch {torch.__version__}, one CPU thread. Left, right: test "
        "pairs with that digit named correctly after the last step, mean ± standard deviation over seeds. "
        "Times: medians over all steps; a step goes from the forward pass to the end of the optimizer's "
        "step. Conflict: the two tasks' gradients of the shared parameters have a negative cosine; where a "
        "step does not need their products, as for the plain sum, they are computed before the timed step."
    )


def _step_times(group: Sequence[Run]) -> tuple[float, float, float]:
    """Return the median seconds of forward and backward, of surgery, and of a whole step."""
    seconds = [times for run in group for times in run.seconds]
    backward, surgery, step = (median(column) for column in zip(*seconds, strict=True))
    return backward, surgery, step


def _accuracies(group: Sequence[Run]) -> list[list[float]]:
    """Return for each task the percentage of correct test predictions of each seed."""
    return [[100 * run.accuracy[t] for run in group] for t in range(len(TASKS))]
