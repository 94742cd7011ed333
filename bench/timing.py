# SPDX-License-Identifier: MIT
"""Time several contenders in one process, round by round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy
from torch import Tensor

from .turns import Foresight, take_turns

OURS = "gradsurgery"
ALLOCATING = "gradsurgery, no out="
REFERENCE = "gradsurgery, reference"
PCGRAD = "gradsurgery pcgrad"
"""The contender that every other method's whole aggregation is compared with."""
FLOOR = "J.sum()"
"""The time of one read of the gradients."""
MM = "torch.mm(J, J.T)"
ONE_MATRIX = "one matrix, torchjd"
"""All gradients of a process in one matrix, averaged over the processes in one call, then TorchJD's PCGrad."""
SUM = "all_reduce of the sum"
"""What plain training sends."""

MIN_ROUNDS = 3
MAX_ROUNDS = 100
MIN_SAMPLE_S = 5e-3
"""Shorter calls are timed in batches. An untimed call comes before each sample, so that the cache already holds as much
of each contender's inputs as fits."""
CAP_S = 15.0
"""About the most time that a contender gets in one case; it is skipped if one call is expected to take longer."""


@dataclass
class Case:
    """Contenders that compute the same thing from the same prepared inputs."""

    stage: str
    tasks: int
    size: int | None
    """N, None for work on T x T alone."""
    dtype: str
    calls: dict[str, Callable[[], Tensor]]
    errors: dict[str, Callable[[Tensor], float]] = field(default_factory=dict)
    """Relative error of a contender's result against a float64 one, for contenders whose exact result is known."""


@dataclass
class Row:
    """What was measured of one contender in one case; times in milliseconds, None where it was skipped."""

    stage: str
    contender: str
    tasks: int
    size: int | None
    dtype: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    error: float | None = None
    note: str = ""


class Clock:
    """Measures cases, and remembers each contender's time to predict which ones would take too long."""

    def __init__(self, seconds: float) -> None:
        """Aim at ``seconds`` for each contender of a case."""
        self.seconds = seconds
        self._foresight = Foresight()

    def measure(self, case: Case) -> list[Row]:
        """Return one row per contender."""
        rows = {n: Row(case.stage, n, case.tasks, case.size, case.dtype) for n in case.calls}
        for row in rows.values():
            expected = self._foresight.seconds((row.stage, row.contender, row.size, row.dtype), row.tasks)
            if expected > CAP_S:
                row.note = f"skipped: one call would take about {expected:.0f} s"
        timed = {n: call for n, call in case.calls.items() if not rows[n].note}
        for name, times in _interleave(timed, self.seconds).items():
            row = rows[name]
            row.rounds = len(times)
            row.p20_ms, row.median_ms, row.p80_ms = (1e3 * numpy.quantile(times, (0.2, 0.5, 0.8))).tolist()
            self._foresight.add((row.stage, name, row.size, row.dtype), row.tasks, row.median_ms / 1e3)
            if name in case.errors:
                row.error = case.errors[name](timed[name]())
        return list(rows.values())


def _interleave(calls: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, list[float]]:
    """Return seconds per call, one value per round: short calls in batches, slow ones in fewer rounds."""
    first: dict[str, list[float]] = {}
    planned: dict[str, int] = {}
    samplers = {}
    for name, call in calls.items():
        once = _seconds(call, 1, warm=False)
        # In a call of more than a second, the cost of a first call and the state of the caches do not matter.
        slow = once > 1
        first[name] = [once] if slow else []
        once = once if slow else _seconds(call, 1, warm=False)
        batch = math.ceil(MIN_SAMPLE_S / once)
        rounds = min(max(MIN_ROUNDS, int(seconds / (once * (batch + 1)))), int(CAP_S / once), MAX_ROUNDS)
        planned[name] = max(0, rounds - len(first[name]))
        samplers[name] = partial(_seconds, call, batch, warm=not slow)
    times = take_turns(samplers, planned)
    return {name: first[name] + times[name] for name in calls}


def _seconds(call: Callable[[], Tensor], batch: int, warm: bool) -> float:
    if warm:
        call()
    begin = time.perf_counter()
    for _ in range(batch):
        call()
    return (time.perf_counter() - begin) / batch
