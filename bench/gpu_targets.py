# SPDX-License-Identifier: MIT
"""The targets of the cuda backend on an H200, and whether a run reached them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .gpu_cases import SOLVED
from .gpu_timing import OURS, TRITON, Row

LARGE, MEDIUM, SMALL = 300e6, 28e6, 2.1e6
"""Bytes of J: from LARGE on the two passes over it take all of the time, above MEDIUM it does not stay on the chip, and
below SMALL the launch takes most of the time."""


@dataclass(frozen=True)
class Target:
    """An upper bound on one figure of our rows; the worst row has to meet it."""

    stage: str
    bound: float
    figure: str = "x_floor"
    """A field of Row. Its ratios (``x_...``) are to the floor by the measured ceilings, the flat form, or ours."""
    contender: str = OURS
    form: str = "flat"
    tasks: tuple[int, int] = (1, 256)
    """First and last T."""
    dtype: str | None = None
    sizes: tuple[float, float] = (0, math.inf)
    """Bytes of J: at least the first, and below the last."""
    batch: int = 1
    cache: str = "cold"

    def text(self) -> str:
        """Return the target in words."""
        unit = {
            "x_floor": "x the floor",
            "x_flat": "x flat",
            "x_ours": "x cuda",
            "median_us": "us",
            "host_us": "us of the host",
            "error": "error",
        }[self.figure]
        first, last = self.tasks
        parts = [
            "triton" if self.contender == TRITON else "",
            self.stage,
            self.form,
            self.dtype or "",
            "" if self.batch == 1 else f"{self.batch} problems",
        ]
        if self.tasks != (1, 256):
            parts.append(f"T={first}" if first == last else f"T<={last}")
        low, high = (f"{size / 1e6:g}" for size in self.sizes)
        if self.sizes != (0, math.inf):
            parts.append(f"J >= {low} MB" if math.isinf(self.sizes[1]) else f"J {low} to {high} MB")
        return f"{' '.join(part for part in parts if part)}: at most {self.bound:g} {unit}"

    def covers(self, row: Row) -> bool:
        """Return whether the target is about this row."""
        return (
            (row.stage, row.contender, row.form, row.batch, row.cache)
            == (self.stage, self.contender, self.form, self.batch, self.cache)
            and self.tasks[0] <= row.tasks <= self.tasks[1]
            and self.dtype in (None, row.dtype)
            and self.sizes[0] <= row.bytes < self.sizes[1]
            and getattr(row, self.figure) is not None
        )


def _solver(stage: str, tasks: int, bound: float, batch: int = 1) -> Target:
    return Target(stage, bound, "median_us", form="solve", tasks=(tasks, tasks), batch=batch, cache="hot")


LARGE_SIZES, MEDIUM_SIZES = (LARGE, math.inf), (MEDIUM, LARGE)
TARGETS = [
    Target("gram", 1.08, tasks=(1, 32), dtype="float32", sizes=LARGE_SIZES),
    Target("gram", 1.08, tasks=(1, 128), dtype="bfloat16", sizes=LARGE_SIZES),
    Target("gram", 1.15, tasks=(48, 48), dtype="float32", sizes=LARGE_SIZES),
    Target("gram", 1.3, tasks=(64, 64), dtype="float32", sizes=LARGE_SIZES),
    Target("gram", 1.8, tasks=(128, 128), dtype="float32", sizes=LARGE_SIZES),
    Target("combine", 1.06, sizes=LARGE_SIZES),
    Target("chain", 1.08, tasks=(1, 32), dtype="float32", sizes=LARGE_SIZES),
    Target("chain", 1.08, tasks=(1, 128), dtype="bfloat16", sizes=LARGE_SIZES),
    Target("chain", 1.05, tasks=(1, 32), dtype="float32", sizes=MEDIUM_SIZES),
    Target("chain", 1.05, tasks=(1, 128), dtype="bfloat16", sizes=MEDIUM_SIZES),
    Target("chain", 6, "median_us", tasks=(1, 16), sizes=(0, SMALL), cache="hot"),
    Target("chain", 10, "host_us", tasks=(1, 16), sizes=(0, SMALL), cache="hot"),
    *(Target(stage, 1.15, "x_flat", form="list") for stage in ("gram", "combine", "chain")),
    *(Target(stage, 1.3, "x_flat", form="misaligned") for stage in ("gram", "combine")),
    *(
        Target(stage, 1.25, "x_ours", TRITON, tasks=(2, 64), dtype=dtype, sizes=(80e6, math.inf))
        for stage in ("gram", "combine")
        for dtype in ("float32", "bfloat16")
    ),
    _solver("pcgrad_weights", 8, 3),
    _solver("pcgrad_weights", 64, 8),
    _solver("min_norm_weights", 8, 5),
    _solver("min_norm_weights", 64, 200),
    _solver("pcgrad_weights", 8, 60, batch=1000),
    _solver("min_norm_weights", 8, 60, batch=1000),
    *(_solver(f"{name} weights", 8, 15) for name in SOLVED),
    *(_solver(f"{name} weights", 8, 1000, batch=1000) for name in SOLVED),
    *(Target("gram", 1e-6, "error", form=form) for form in ("flat", "list", "misaligned")),
]


def judge(rows: list[Row]) -> list[dict[str, str | float | bool | None]]:
    """Return each target with the worst measured figure, its case, and whether it is met; None without a row."""
    verdicts = []
    for target in TARGETS:
        covered = [row for row in rows if target.covers(row)]
        # NaN is the worst of all.
        worst = max(
            covered,
            key=lambda row: (math.isnan(getattr(row, target.figure)), getattr(row, target.figure)),
            default=None,
        )
        measured = None if worst is None else getattr(worst, target.figure)
        verdicts.append(
            {
                "target": target.text(),
                "measured": measured,
                "worst": "" if worst is None else _place(worst),
                "met": None if measured is None else measured <= target.bound,
            }
        )
    return verdicts


def _place(row: Row) -> str:
    return f"T={row.tasks} {row.dtype}" + (f" J={row.bytes / 1e6:.0f} MB" if row.bytes else "")
