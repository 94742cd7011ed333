# SPDX-License-Identifier: MIT
"""One table: gradsurgery beside other implementations, all measured in this process.

Run ``python -m bench.peers`` from the repository's root. NOTES.md says how the measurements are taken.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

import gradsurgery as gs

from .cases import (
    combine_case,
    gram_case,
    mgda_case,
    overhead_case,
    pcgrad_case,
    task_gradients,
    weights_cases,
)
from .origin import provenance, write
from .tables import print_rows
from .targets import TARGETS, judge, print_targets
from .timing import Case, Clock, Row

RESULTS = Path(__file__).parent / "results" / "cpu-peers.json"


@dataclass(frozen=True)
class Plan:
    """Which sizes a run takes, and how many seconds it gives each contender of a case."""

    seconds: float
    tasks: tuple[int, ...]
    sizes: tuple[int, ...]
    stage_size: int
    many_tasks: tuple[int, int]
    """T and N of a Gram matrix with more tasks, at fewer parameters."""


FULL = Plan(0.7, (2, 4, 8, 16, 32), (10**5, 10**6, 10**7), 10**7, (64, 2_500_000))
QUICK = Plan(0.02, (2, 8), (10**4,), 10**4, (64, 10**3))
COPIES = 5
"""Copies of a float32 J that must fit: J, its rounding to bfloat16, projection loops' clones and stack, a margin."""


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--only", choices=["stages", "peers"], help="half of the cases")
    parser.add_argument("--output", type=Path, help=f"where the JSON goes; a whole run's: {RESULTS.name}")
    options = parser.parse_args()
    if not gs.backends()["cpu"].startswith("available"):
        parser.error(f"the cpu backend cannot be measured: {gs.backends()['cpu']}")

    plan = QUICK if options.quick else FULL
    # Read before the run: the sources may be edited while it lasts.
    origin = provenance(torch.device("cpu"))
    console = Console(width=124)
    clock = Clock(plan.seconds)
    rows = _too_large(plan)
    for case in _cases(plan, options.only):
        print(f"{case.stage} T={case.tasks} N={case.size} {case.dtype}", file=sys.stderr)
        rows += clock.measure(case)
    print_rows(console, rows, origin["machine"])
    verdicts = judge(rows, TARGETS)
    print_targets(verdicts)
    flags = (" --quick" if options.quick else "") + (f" --only {options.only}" if options.only else "")
    if output := options.output or (None if flags else RESULTS):
        write(output, f"python -m bench.peers{flags}", origin, rows, verdicts)


def _fits(tasks: int, size: int) -> bool:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return COPIES * 4 * tasks * size <= memory / 2


def _too_large(plan: Plan) -> list[Row]:
    """Return a row with a note for each size that is left out for want of memory."""
    shapes = {(t, n) for t in plan.tasks for n in (*plan.sizes, plan.stage_size)} | {plan.many_tasks}
    need = "skipped: needs about {:.0f} GB of memory, twice over"
    return [
        Row("all", "all", t, n, "all", note=need.format(COPIES * 4 * t * n / 1e9))
        for t, n in sorted(shapes)
        if not _fits(t, n)
    ]


def _cases(plan: Plan, only: str | None) -> Iterator[Case]:
    if only != "peers":
        yield from _stage_cases(plan)
    if only != "stages":
        for size in plan.sizes:
            yield from _peer_cases([tasks for tasks in plan.tasks if _fits(tasks, size)], size)


def _stage_cases(plan: Plan) -> Iterator[Case]:
    yield overhead_case()
    yield from weights_cases(64)
    if _fits(*plan.many_tasks):
        yield gram_case(task_gradients(*plan.many_tasks))
    fitting = [tasks for tasks in plan.tasks if _fits(tasks, plan.stage_size)]
    gradients = task_gradients(max(fitting), plan.stage_size)
    for tasks in fitting:
        yield gram_case(gradients[:tasks])
        yield combine_case(gradients[:tasks])


def _peer_cases(tasks: list[int], size: int) -> Iterator[Case]:
    gradients = task_gradients(max(tasks), size)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = gradients.to(dtype)
        for count in tasks:
            yield pcgrad_case(rounded[:count])
            yield mgda_case(rounded[:count])


if __name__ == "__main__":
    main()
