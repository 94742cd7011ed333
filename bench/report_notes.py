# SPDX-License-Identifier: MIT
"""The tables of NOTES.md that report.py writes from stored results."""

from __future__ import annotations

from typing import Any

from .step_contenders import COMMON, ONE_BY_ONE, PLAIN
from .timing import ONE_MATRIX, OURS, PCGRAD, SUM

MODELS = {
    "rl": "10 tasks with batches of their own, 3 x 400 hidden",
    "resnet": "ResNet-18 of width 16, 10 binary heads",
    "scene": "encoder-decoder, 3 tasks",
    "transformer": "2 layers, 4 text domains, all parameters shared",
}
STEPS = {
    "sum of losses": (PLAIN,),
    "ours, sequential": ("pcgrad, sequential",),
    "ours, features and batched": ("pcgrad, features, batched", "pcgrad, batched"),
    "ours, representation": ("pcgrad, representation",),
    "pytorch_optimizer": (COMMON,),
    "torchjd, batched": ("torchjd PCGrad",),
    "torchjd, one by one": (ONE_BY_ONE,),
}
"""Contenders by column, the first that a model has."""


def methods_table(run: dict[str, Any]) -> str:
    """Return the table of every Gram method."""
    medians = {
        (row["stage"], row["contender"], row["tasks"], row["size"]): row["median_ms"]
        for row in run["rows"]
        if row["median_ms"] is not None
    }
    counts = sorted({row["tasks"] for row in run["rows"]})
    lines = [
        f"On {_where(run)}:",
        "",
        f"| method | {' | '.join(f'T = {tasks}' for tasks in counts)} | aggregation |",
        f"|---|{'--:|' * (len(counts) + 1)}",
    ]
    for name, size in dict.fromkeys((row["stage"], row["size"]) for row in run["rows"] if row["size"]):
        cells = []
        for tasks in counts:
            ours, theirs = (medians.get((f"{name} weights", who, tasks, None)) for who in (OURS, "torchjd"))
            cells.append(_short(ours * 1e3) + ("" if theirs is None else f" ({_short(theirs / ours)} x)"))
        whole, pcgrad = (medians[name, who, 8, size] for who in (OURS, PCGRAD))
        lines.append(f"| `{name}` | {' | '.join(cells)} | {whole / pcgrad:.2f} |")
    return "\n".join(lines) + "\n"


def steps_table(run: dict[str, Any]) -> str:
    """Return the table of whole training steps."""
    rows = {(row["workload"], row["contender"]): row for row in run["rows"] if row["median_ms"] is not None}
    lines = [
        f"On {_where(run)}; milliseconds, with surgery in brackets:",
        "",
        f"| model | {' | '.join(STEPS)} |",
        f"|---|{'---|' * len(STEPS)}",
    ]
    for model, description in MODELS.items():
        cells = []
        for contenders in STEPS.values():
            row = next((rows[model, name] for name in contenders if (model, name) in rows), None)
            cells.append("-" if row is None else _step_cell(row))
        lines.append(f"| {model}: {description} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def processes_table(run: dict[str, Any]) -> str:
    """Return the table of several processes."""
    cases: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in run["rows"]:
        cases.setdefault((row["stage"], row["tasks"], row["size"]), {})[row["contender"]] = row["median_ms"]
    lines = [
        f"On {_where(run)}:",
        "",
        "| | T | N | gradsurgery | one matrix, torchjd | sum |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for (stage, tasks, size), medians in cases.items():
        ours, theirs, plain = (medians[name] for name in (OURS, ONE_MATRIX, SUM))
        cells = [_short(ours), f"{_short(theirs)} ({theirs / ours:.2f} x)", _short(plain)]
        lines.append(f"| {stage} | {tasks} | {size:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _step_cell(row: dict[str, Any]) -> str:
    surgery = row["parts_ms"]["surgery"]
    return _short(row["median_ms"]) + (f" ({_short(surgery)})" if surgery else "")


def commit_of(run: dict[str, Any]) -> str:
    """Return a run's commit and date, in words."""
    return f"commit {run['commit'][:12]}, {run['date'][:10]}"


def _where(run: dict[str, Any]) -> str:
    machine = run["machine"]
    load = f"load {machine['load_at_start']:.1f} at the start"
    return f"{machine['threads']} cores of {machine['cpu']}, {load}, {commit_of(run)}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
