# SPDX-License-Identifier: MIT
"""From task gradients to the direction on a GPU: this package beside others, in one process.

Run ``bench/gpu.sh --peers``, or ``python -m bench.gpu_peers`` from the repository's root. Several sets of inputs take
turns; together they are twice as large as the level-2 cache. Each contender is timed as a program calls it ("eager":
enqueued in a row, with one wait at the end), and as a CUDA graph if the host has no part in it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch

from .counts import launches, peak_bytes, synchronisations
from .exact import direction_error, exact_gram
from .gpu_cases import DTYPES, Bench
from .gpu_ceilings import measure as measure_ceilings
from .gpu_peer_contenders import METHODS, Contender, contenders
from .gpu_peer_targets import PeerRow, judge
from .gpu_report import parse_options, print_ceilings, store
from .gpu_timing import OURS, TRITON, Call, Spec, eager_sampler, failure, graph_sampler, interleave, quantiles
from .origin import provenance
from .targets import print_targets
from .turns import Foresight

CAP_S = 0.5
"""A contender is skipped if one call is expected to take longer, from a case with fewer tasks, as the square of T."""
COPIES = 5
"""Copies of the largest J that must fit into memory: three for the inputs, a stack of its rows, a margin."""


@dataclass(frozen=True)
class Plan:
    """Which cases a run takes, the ones that matter most first."""

    seconds: float
    """For each contender of a case."""
    ceiling_bytes: int
    tasks: tuple[int, ...]
    """In ascending order: a contender's time is predicted from a case with fewer tasks."""
    sizes: tuple[int, ...]
    counted: tuple[int, ...]
    """The sizes at which launches are counted, which takes long: ours at all of these, others' at the first only, as
    they seldom depend on N."""


FULL = Plan(0.05, 2 << 30, (2, 4, 8, 16, 32, 64), (10**5, 10**7, 10**8, 10**6), (10**5, 10**7))
QUICK = Plan(0.002, 16 << 20, (2, 4), (10**4,), (10**4,))


def main() -> int:
    """Measure, print and store; return 1 if one of our contenders failed."""
    options = parse_options("bench.gpu_peers", __doc__.splitlines()[0])
    deadline = time.monotonic() + options.budget
    plan = QUICK if options.quick else FULL
    device = torch.device(options.device)
    origin = provenance(device)
    ceilings = measure_ceilings(device, plan.ceiling_bytes)
    print(f"{origin['machine']}\n{origin['versions']}\ncommit {origin['commit']}\n")
    print_ceilings(ceilings)
    rows: list[PeerRow] = []
    clock = Clock(device, plan, ceilings)
    try:
        for bench, specs in _inputs(plan, device):
            for spec in specs:
                if bench is None or time.monotonic() > deadline:
                    why = "the memory is too small" if bench is None else "the time is up"
                    rows.append(PeerRow(**asdict(spec), note=f"left out: {why}"))
                    continue
                try:
                    measured = clock.measure(bench, spec)
                except Exception as error:
                    measured = [PeerRow(**asdict(spec), note=failure(error))]
                print_case(spec, measured)
                rows += measured
    finally:  # stores a run that is cut off, too
        verdicts = judge(rows)
        print_targets(verdicts)
        store(options.output, "gpu-peers", options.command, origin, rows, verdicts, ceilings=ceilings)
        left_out = sum(row.note.startswith("left out") for row in rows)
        print(f"{left_out} cases left out")
    return int(any(row.note.startswith("failed") and row.contender in (OURS, TRITON) for row in rows))


def _inputs(plan: Plan, device: torch.device) -> Iterator[tuple[Bench | None, list[Spec]]]:
    """Yield inputs of one size and dtype and what to measure on them; None where they do not fit into memory."""
    for size, (name, dtype) in product(plan.sizes, DTYPES.items()):
        cache, fitting = 0, float("inf")
        if device.type == "cuda":
            torch.cuda.empty_cache()
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            fitting = torch.cuda.mem_get_info(device)[0] / COPIES
        shapes = [Spec(method, "flat", tasks, size, name, "cold") for method, tasks in product(METHODS, plan.tasks)]
        largest = max(spec.bytes for spec in shapes if spec.bytes <= fitting)
        bench = Bench.create(device, cache, largest + largest // 100, {name: dtype})
        yield bench, [spec for spec in shapes if spec.bytes <= largest]
        yield None, [spec for spec in shapes if spec.bytes > largest]
        del bench  # before there is the next one


class Clock:
    """Measures cases, and remembers what each contender took to foresee which ones take too long."""

    def __init__(self, device: torch.device, plan: Plan, ceilings: dict[str, float]) -> None:
        """Measure on a device whose ceilings are known."""
        self.device, self.plan, self.ceilings = device, plan, ceilings
        self._foresight = Foresight()

    def measure(self, bench: Bench, spec: Spec) -> list[PeerRow]:
        """Return a row for each contender and way to call it."""
        matrices = bench.matrices(spec)
        exact = exact_gram(matrices[0])
        direction_bytes = spec.bytes // spec.tasks
        moved = spec.bytes / self.ceilings["read GB/s"] + (spec.bytes + direction_bytes) / self.ceilings["copy GB/s"]
        rows, samplers = [], {}
        for contender in contenders(bench, spec, matrices, exact):
            row = PeerRow(**asdict(spec), contender=contender.name, floor_us=moved / 1e3)
            rows.append(row)
            expected = self._foresight.seconds((row.stage, row.contender, row.size, row.dtype), row.tasks)
            if expected > CAP_S:
                row.note = f"skipped: one call would take about {expected:.0f} s"
                continue
            try:
                calls = contender.calls(matrices)
                self.describe(row, contender, matrices[0], calls)
                samplers[len(rows) - 1] = eager_sampler(calls, self.device)
                if contender.captured and self.device.type == "cuda":
                    rows.append(PeerRow(**asdict(spec), contender=row.contender, floor_us=row.floor_us, how="graph"))
                    samplers[len(rows) - 1] = graph_sampler(calls, self.device)
            except Exception as error:  # of whatever type a compiler raises
                rows[-1].note = failure(error)
        for index, times in interleave(samplers, self.plan.seconds).items():
            self._enter(rows[index], times)
        if self.device.type == "cuda":
            # Memory of the case's graphs serves no other case until it is given back.
            samplers.clear()
            torch.cuda.empty_cache()
        ours = {row.how: row.median_us for row in rows if row.contender == OURS}
        for row in rows:
            if row.contender != OURS and row.median_us and ours.get(row.how):
                row.x_ours = row.median_us / ours[row.how]
        return rows

    def describe(self, row: PeerRow, contender: Contender, first: torch.Tensor, calls: list[Call]) -> None:
        """Enter everything but times: the error of a first call, and the counts of one call."""
        result = contender.calls([first])[0]()
        if contender.weights is not None:
            row.error = direction_error(first, contender.weights, result)
        row.peak_mb = peak_bytes(calls[0], self.device) / 1e6
        counted = self.plan.counted if row.contender in (OURS, TRITON) else self.plan.counted[:1]
        if row.size in counted:
            row.launches = launches(calls[0], self.device)
        row.synchronisations = synchronisations(calls[0], self.device)

    def _enter(self, row: PeerRow, times: list[float]) -> None:
        row.rounds = len(times)
        row.p20_us, row.median_us, row.p80_us = quantiles(times)
        row.x_floor = row.median_us / row.floor_us
        if row.how == "eager":
            self._foresight.add((row.stage, row.contender, row.size, row.dtype), row.tasks, row.median_us / 1e6)


def print_case(spec: Spec, rows: list[PeerRow]) -> None:
    """Print a case as soon as it is there."""
    print(f"\n{spec.stage} T={spec.tasks} N={spec.size:g} {spec.dtype}")
    for row in rows:
        if row.median_us is None:
            print(f"  {row.contender:26}{row.how:6}{row.note}")
            continue
        figures = (row.median_us, row.p20_us, row.p80_us, row.x_floor, row.x_ours, row.peak_mb, row.error)
        cells = "".join(f"{'-' if figure is None else f'{figure:.4g}':>10}" for figure in figures)
        counts = "".join(f"{'-' if c is None else c:>7}" for c in (row.launches, row.synchronisations, row.rounds))
        print(f"  {row.contender:26}{row.how:6}{cells}{counts}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
