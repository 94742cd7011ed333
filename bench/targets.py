# SPDX-License-Identifier: MIT
"""The targets of the CPU backend, and whether a run reached them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .timing import FLOOR, MM, OURS, Row


@dataclass(frozen=True)
class Target:
    """A bound on our median time in one case: in milliseconds, or relative to another contender's median."""

    stage: str
    tasks: int
    size: int | None
    bound: float
    against: str | None = None
    faster: bool = False
    """If true, we must be at least ``bound`` times as fast as ``against``; else we may take at most that many times as
    long.
    """

    def text(self) -> str:
        """Return the target in words."""
        case = f"{self.stage} T={self.tasks}" + ("" if self.size is None else f" N={self.size:g}")
        if self.against is None:
            return f"{case}: at most {self.bound:g} ms"
        if self.faster:
            return f"{case}: at least {self.bound:g} x faster than {self.against}"
        return f"{case}: at most {self.bound:.3g} x {self.against}"

    def measured(self, medians: dict[tuple[str, str, int, int | None], float]) -> float | None:
        """Return the figure that the bound is about, None if the run does not have it."""
        stage, case = self.stage, (self.tasks, self.size)
        ours = medians.get((stage, OURS, *case))
        other = 1.0 if self.against is None else medians.get((stage, self.against, *case))
        if ours is None or other is None:
            return None
        return other / ours if self.faster else ours / other

    def met(self, measured: float) -> bool:
        """Return whether the figure is within the bound."""
        return measured >= self.bound if self.faster else measured <= self.bound


TARGETS = [
    *(Target("gram", t, 10**7, 1.4, FLOOR) for t in (2, 4, 8)),
    *(Target("gram", t, 10**7, 4, MM, faster=True) for t in (4, 8)),
    *(Target("gram", t, 10**7, 2, MM, faster=True) for t in (16, 32)),
    Target("gram", 64, 2_500_000, 2, MM, faster=True),
    # Combine reads T rows and writes one; the sum reads T.
    *(Target("combine", t, 10**7, 1.3 * (t + 1) / t, FLOOR) for t in (2, 4, 8)),
    Target("pcgrad", 8, 10**7, 4, "torchjd", faster=True),
    Target("pcgrad", 8, 10**7, 40, "pytorch_optimizer", faster=True),
    Target("pcgrad", 2, 10**6, 1.3, "torchjd", faster=True),
    Target("pcgrad", 2, 10**6, 10, "pytorch_optimizer", faster=True),
    Target("pcgrad_weights", 64, None, 0.3),
    Target("min_norm_weights", 64, None, 5),
    Target("pcgrad", 2, 16, 0.04),
]


def judge(rows: list[Row], targets: list[Target]) -> list[dict[str, str | float | bool | None]]:
    """Return each target with its measured figure and whether it is met; None where the run has no row."""
    medians = {
        (row.stage, row.contender, row.tasks, row.size): row.median_ms
        for row in rows
        if row.median_ms is not None and row.dtype != "bfloat16"
    }
    verdicts = []
    for target in targets:
        measured = target.measured(medians)
        met = None if measured is None else target.met(measured)
        verdicts.append({"target": target.text(), "measured": measured, "met": met})
    return verdicts


def print_targets(verdicts: list[dict[str, Any]]) -> None:
    """Print each target with the measured figure and the case it comes from."""
    words = {True: "met", False: "missed", None: "not measured"}
    for verdict in verdicts:
        figure = "-" if verdict["measured"] is None else f"{verdict['measured']:.3g}"
        print(f"{words[verdict['met']]:13}{figure:>9}  {verdict['target']:74}{verdict.get('worst', '')}".rstrip())
