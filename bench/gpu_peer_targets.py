# SPDX-License-Identifier: MIT
"""A run's rows, how much faster than other packages the cuda backend should be, and whether it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .gpu_peer_contenders import PRODUCTS
from .gpu_timing import Row
from .targets import Target

SIZES = (10**5, 10**6, 10**7, 10**8)
TARGETS = [
    *(Target("pcgrad", tasks, 10**5, 5, PRODUCTS, faster=True) for tasks in (2, 8, 32)),
    *(Target("pcgrad", tasks, size, 2, PRODUCTS, faster=True) for tasks in (2, 8, 32) for size in SIZES[2:]),
    *(Target("pcgrad", 8, size, 20, "pytorch_optimizer", faster=True) for size in SIZES),
    Target("pcgrad", 32, 10**5, 300, "pytorch_optimizer", faster=True),
]


@dataclass
class PeerRow(Row):
    """What was measured of one contender, called in one way."""

    how: str = "eager"
    """eager or graph."""
    peak_mb: float | None = None
    """The most memory that a call takes in addition to what was there before."""
    launches: int | None = None
    """Kernels, copies and fills of a call."""
    synchronisations: int | None = None
    """Waits of the host in a call."""


def judge(rows: Sequence[PeerRow]) -> list[dict[str, Any]]:
    """Return each target with the measured figure, per dtype and way to call; None where there is no row at all."""
    medians: dict[tuple[str, str], dict[tuple[str, str, int, int | None], float]] = {}
    for row in rows:
        if row.median_us is not None:
            key = row.stage, row.contender, row.tasks, row.size
            medians.setdefault((row.dtype, row.how), {})[key] = row.median_us
    verdicts: list[dict[str, Any]] = []
    for target in TARGETS:
        figures = [(*way, target.measured(found)) for way, found in medians.items()]
        measured = [(dtype, how, figure) for dtype, how, figure in figures if figure is not None]
        for dtype, how, figure in measured:
            verdicts.append(
                {"target": f"{target.text()}, {dtype}, {how}", "measured": figure, "met": target.met(figure)}
            )
        if not measured:
            verdicts.append({"target": target.text(), "measured": None, "met": None})
    return verdicts
