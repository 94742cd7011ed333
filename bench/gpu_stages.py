# SPDX-License-Identifier: MIT
"""The stages on a GPU, beside its measured ceilings and PyTorch's matrix products.

Run ``bench/gpu.sh --bench``, or ``python -m bench.gpu_stages`` from the repository's root. For the cold figures several
sets of inputs take turns, together twice as large as the level-2 cache; graphs exclude the host's time. The floor is
the time for the bytes that a stage has to move: T N elements for gram at the read ceiling, (T + 1) N for combine at the
copy ceiling, both for the chain from gradients to direction.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch

from .gpu_cases import DTYPES, SOLVED, STAGES, Bench, columns, prepare
from .gpu_ceilings import measure as measure_ceilings
from .gpu_report import parse_options, print_ceilings, print_heading, print_row, store
from .gpu_targets import judge
from .gpu_timing import OURS, TRITON, Row, Spec, failure, measure
from .origin import provenance
from .targets import print_targets

SOLVES = [(stage, tasks, 1) for stage in ("pcgrad_weights", "min_norm_weights") for tasks in (8, 64)]
SOLVES += [("pcgrad_weights", 8, 1000), ("min_norm_weights", 8, 1000)]
SOLVES += [(f"{name} weights", *size) for name in SOLVED for size in ((8, 1), (64, 1), (8, 1000))]
COPIES = 8
"""Copies of the largest J that must fit into memory: three for each dtype's values, directions, float64 blocks."""


@dataclass(frozen=True)
class Plan:
    """Which cases a run takes; sizes are bytes of J, the ones that matter most first."""

    seconds: float
    """For each contender of a case."""
    ceiling_bytes: int
    tasks: tuple[int, ...]
    sizes: tuple[float, ...]
    small: float
    """A size that is also measured in the cache, and with the host's time."""
    form_tasks: tuple[int, ...]
    """T for the list form and misaligned rows."""
    form_sizes: tuple[float, ...]
    solves: list[tuple[str, int, int]]
    """Stage, T and number of problems of the work on T x T."""


FULL = Plan(
    seconds=0.06,
    ceiling_bytes=2 << 30,
    tasks=(2, 3, 5, 8, 12, 16, 24, 32, 48, 64, 128),
    sizes=(300e6, 28e6, 80e6, 2e6, 1.2e9),
    small=2e6,
    form_tasks=(2, 8, 32),
    form_sizes=(28e6, 300e6),
    solves=SOLVES,
)
QUICK = Plan(
    seconds=0.003,
    ceiling_bytes=16 << 20,
    tasks=(2, 8),
    sizes=(4e5,),
    small=1e5,
    form_tasks=(2,),
    form_sizes=(4e5,),
    solves=[(stage, tasks, batch) for stage, tasks, batch in SOLVES if tasks == 8 and batch == 1],
)


def main() -> int:
    """Measure, print and store; return 1 if a case failed."""
    options = parse_options("bench.gpu_stages", __doc__.splitlines()[0])
    deadline = time.monotonic() + options.budget
    plan = QUICK if options.quick else FULL
    device = torch.device(options.device)
    origin = provenance(device)
    ceilings = measure_ceilings(device, plan.ceiling_bytes)
    print(f"{origin['machine']}\n{origin['versions']}\ncommit {origin['commit']}\n")
    print_ceilings(ceilings)
    print()
    print_heading()
    rows: list[Row] = []
    bench, specs = _inputs(plan, device)
    try:
        for spec in specs:
            if time.monotonic() > deadline:
                rows.append(Row(**asdict(spec), note="left out: the time is up"))
                continue
            rows += _measured(bench, spec, plan.seconds, ceilings)
    finally:  # stores a run that is cut off, too
        print()
        verdicts = judge(rows)
        print_targets(verdicts)
        store(options.output, "gpu-stages", options.command, origin, rows, verdicts, ceilings=ceilings)
        failed, left_out = (sum(row.note.startswith(why) for row in rows) for why in ("failed", "left out"))
        print(f"{failed} failed, {left_out} cases left out")
    return int(any(row.note.startswith("failed") and row.contender in (OURS, TRITON) for row in rows))


def _measured(bench: Bench, spec: Spec, seconds: float, ceilings: dict[str, float]) -> list[Row]:
    """Return a case's rows, and print them: one that says why if ours failed."""
    try:
        rows = measure(prepare(bench, spec), bench.device, seconds, ceilings)
        if bench.device.type == "cuda":
            # Memory of the case's graphs serves no other case until it is given back.
            torch.cuda.empty_cache()
    except Exception as error:
        rows = [Row(**asdict(spec), note=failure(error))]
    for row in rows:
        print_row(row)
    return rows


def _inputs(plan: Plan, device: torch.device) -> tuple[Bench, Iterator[Spec]]:
    """Return the inputs and what to measure on them, without the sizes that do not fit into memory."""
    cache, fitting = 0, max(plan.sizes)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        fitting = torch.cuda.mem_get_info(device)[0] / COPIES
    largest = max(size for size in plan.sizes if size <= fitting)
    specs = (spec for spec in _specs(plan) if spec.bytes <= 1.01 * largest)
    return Bench.create(device, cache, round(1.01 * largest)), specs


def _specs(plan: Plan) -> Iterator[Spec]:
    def of(form: str, nominal: float, tasks: tuple[int, ...], stages: tuple[str, ...], cache: str) -> Iterator[Spec]:
        for dtype, count, stage in product(DTYPES, tasks, stages):
            yield Spec(stage, form, count, columns(nominal, count, dtype), dtype, cache)

    for nominal in plan.sizes[:2]:
        yield from of("flat", nominal, plan.tasks, STAGES, "cold")
    for stage, tasks, batch in plan.solves:
        yield Spec(stage, "solve", tasks, None, "float64", "hot", batch)
    for nominal in plan.form_sizes:
        yield from of("list", nominal, plan.form_tasks, STAGES, "cold")
        yield from of("misaligned", nominal, plan.form_tasks, ("gram", "combine"), "cold")
    yield from of("list", plan.small, plan.form_tasks, STAGES, "hot")
    yield from of("flat", plan.small, plan.tasks, STAGES, "hot")
    for nominal in plan.sizes[2:]:
        yield from of("flat", nominal, plan.tasks, STAGES, "cold")


if __name__ == "__main__":
    sys.exit(main())
