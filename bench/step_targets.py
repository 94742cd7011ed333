# SPDX-License-Identifier: MIT
"""The targets for the cost of a training step with surgery, and whether a run reached them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .step_contenders import COMMON, ONE_BY_ONE

Rows = dict[tuple[str, str], Any]
"""Maps (workload, contender) to a row with times."""
WAYS = ("sequential", "batched", "features, batched")


def _surgery_ms(rows: Rows, workload: str) -> float:
    return float(rows[workload, "pcgrad, sequential"].parts_ms["surgery"])


def _times_common(workload: str) -> Callable[[Rows], float]:
    return lambda rows: float(rows[workload, COMMON].parts_ms["surgery"]) / _surgery_ms(rows, workload)


def _step_of_torchjd(rows: Rows) -> float:
    ours = min(rows["rl", f"pcgrad, {way}"].median_ms for way in WAYS)
    theirs = min(rows["rl", name].median_ms for name in ("torchjd PCGrad", ONE_BY_ONE))
    return float(ours / theirs)


def _share(workload: str) -> Callable[[Rows], float]:
    def share(rows: Rows) -> float:
        row = rows[workload, "pcgrad, sequential"]
        return float(row.parts_ms["surgery"] / row.median_ms)

    return share


# Per device: words, figure, bound, whether the bound is the least.
TARGETS: dict[str, list[tuple[str, Callable[[Rows], float], float, bool]]] = {
    "cpu": [
        ("rl: surgery at least 20 x faster than pytorch_optimizer's", _times_common("rl"), 20, True),
        ("rl: a step at most 1 x torchjd's", _step_of_torchjd, 1, False),
    ],
    "cuda": [
        ("rl: surgery at most 0.1 ms", lambda rows: _surgery_ms(rows, "rl"), 0.1, False),
        ("rl: surgery at least 100 x faster than pytorch_optimizer's", _times_common("rl"), 100, True),
        ("rl: a step at most 1 x torchjd's", _step_of_torchjd, 1, False),
        *(
            (f"{name}: surgery at most 0.03 of the step", _share(name), 0.03, False)
            for name in ("resnet", "scene", "transformer")
        ),
    ],
}


def judge(rows: list[Any], device: str) -> list[dict[str, Any]]:
    """Return each target with the figure that the run has for it; None where it has none."""
    measured = {(row.workload, row.contender): row for row in rows if row.median_ms is not None}
    verdicts = []
    for words, figure, bound, least in TARGETS[device]:
        try:
            value = figure(measured)
        except KeyError:
            verdicts.append({"target": words, "measured": None, "met": None})
            continue
        verdicts.append({"target": words, "measured": value, "met": value >= bound if least else value <= bound})
    return verdicts
