# SPDX-License-Identifier: MIT
"""Time whole training steps: forward, backward, surgery, optimizer.

Run ``python -m bench.step`` from the repository's root. NOTES.md says how the measurements are taken.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from .counts import peak_bytes
from .gpu_report import RESULTS, store
from .gpu_timing import failure
from .origin import provenance
from .step_contenders import METHODS, PARTS, Step, contenders
from .step_models import WORKLOADS, MultiTaskModel, Workload
from .step_targets import judge
from .targets import print_targets
from .turns import take_turns


@dataclass
class Row:
    """One contender's step: medians in milliseconds, of the whole and of its parts; None where it failed."""

    workload: str
    contender: str
    tasks: int
    shared: int
    """Elements of the shared parameters, N."""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    parts_ms: dict[str, float] = field(default_factory=dict)
    peak_mb: float | None = None
    """The most memory that a step takes in addition to what was there before."""
    rounds: int = 0
    note: str = ""


class Watch:
    """Adds up the time of each part of a step, waiting for the GPU at its ends."""

    def __init__(self, device: torch.device) -> None:
        """Measure on a device."""
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what runs in it."""
        begin = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - begin

    def now(self) -> float:
        """Return the time at which all work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def main() -> int:
    """Measure, print and store; return 1 if one of our contenders failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu: smaller models")
    parser.add_argument("--seconds", type=float, default=4, help="for each contender of a model")
    parser.add_argument("--only", choices=[w.name for w in WORKLOADS], help="one of the models")
    parser.add_argument("--output", type=Path, help=f"the folder of the JSON; a whole run's: {RESULTS.name}")
    options = parser.parse_args()
    device = torch.device(options.device)
    origin = provenance(device)
    print(f"{origin['machine']}\n{origin['versions']}\ncommit {origin['commit']}")
    command = "python -m bench.step" + "".join(
        f" --{name} {value}"
        for name, value in vars(options).items()
        if name != "output" and value != parser.get_default(name)
    )
    is_trial = options.only is not None or options.seconds != parser.get_default("seconds")
    output = options.output or (None if is_trial else RESULTS)
    rows: list[Row] = []
    for workload in WORKLOADS:
        if options.only in (None, workload.name):
            measured = measure(workload, device, options.seconds)
            print_rows(measured)
            rows += measured
            # Written after each model, in case the run is cut off.
            store(output, "step", command, origin, rows, judge(rows, device.type))
    print_targets(judge(rows, device.type))
    return int(any(row.note for row in rows if row.contender.startswith(METHODS)))


def measure(workload: Workload, device: torch.device, seconds: float) -> list[Row]:
    """Return a row per contender. They take turns, in an order that changes each round."""
    full = workload.full if device.type == "cuda" else workload.small

    def make() -> MultiTaskModel:
        torch.manual_seed(0)
        with torch.device(device):
            return full()

    model = make()
    tasks, shared = len(model.losses()), sum(p.numel() for p in model.trunk())
    del model
    rows, steps, planned = {}, {}, {}
    for name, prepare in contenders(make).items():
        row = rows[name] = Row(workload.name, name, tasks, shared)
        try:
            step = prepare()
            for _ in range(2):
                _time(step, device)
            once = sum(_time(step, device).values())
            gc.collect()  # otherwise what earlier steps left in reference cycles would be freed during the measurement
            row.peak_mb = peak_bytes(partial(_time, step, device), device) / 1e6
        except Exception as error:  # of whatever type another package raises
            row.note = failure(error)
            continue
        steps[name], planned[name] = step, max(5, min(200, int(seconds / once)))

    def sample(name: str) -> dict[str, float]:
        row = rows[name]
        if not row.note:
            try:
                return _time(steps[name], device)
            except Exception as error:
                row.note = failure(error)
        return {}

    times = take_turns({name: partial(sample, name) for name in steps}, planned, gc.collect)
    for name, samples in times.items():
        row = rows[name]
        if row.note:
            continue
        whole = [1e3 * sum(sample.values()) for sample in samples]
        row.rounds, row.median_ms = len(samples), statistics.median(whole)
        row.p20_ms, _, _, row.p80_ms = statistics.quantiles(whole, n=5)
        row.parts_ms = {p: 1e3 * statistics.median(sample.get(p, 0.0) for sample in samples) for p in PARTS}
    return list(rows.values())


def _time(step: Step, device: torch.device) -> dict[str, float]:
    watch = Watch(device)
    step(watch.part)
    return watch.seconds


def print_rows(rows: list[Row]) -> None:
    """Print a table."""
    first = rows[0]
    print(f"\n{first.workload}: T = {first.tasks}, N = {first.shared:,}; milliseconds, medians")
    print(f"{'':30}{'step':>9}{'p20':>9}{'p80':>9}" + "".join(f"{part:>11}" for part in PARTS) + f"{'peak MB':>10}")
    for row in rows:
        if row.median_ms is None:
            print(f"{row.contender:30}{row.note}")
            continue
        figures = [row.median_ms, row.p20_ms, row.p80_ms]
        cells = "".join(f"{figure:9.2f}" for figure in figures) + "".join(f"{row.parts_ms[p]:11.3f}" for p in PARTS)
        print(f"{row.contender:30}{cells}{row.peak_mb:10.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
