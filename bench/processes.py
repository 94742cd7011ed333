# SPDX-License-Identifier: MIT
"""Averaging task gradients over several processes, with surgery: time from the gradients to ``.grad``.

Run ``python -m bench.processes`` from the repository's root, as root on Linux: a part of the run limits the loopback
device of a network of its own. NOTES.md says how the measurements are taken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy
import torch
from rich.console import Console
from torch import Tensor, distributed, multiprocessing
from torchjd.aggregation import PCGrad

import gradsurgery as gs

from .origin import provenance, write
from .tables import print_rows
from .targets import Target, judge, print_targets
from .timing import ONE_MATRIX, OURS, SUM, Row
from .turns import take_turns

RESULTS = Path(__file__).parent / "results" / "cpu-processes.json"
FREE, LIMITED = "loopback", "2 Gbit/s"
LIMIT = "ip link set lo up && tc qdisc add dev lo root tbf rate 2gbit burst 4mb latency 400ms"
WORLDS = (2, 4)
TENSORS = 50
CASES = {FREE: [(8, 10**5), (2, 4 * 10**6), (8, 4 * 10**6)], LIMITED: [(2, 4 * 10**6), (8, 4 * 10**6)]}
ROUNDS = 7
# All_reduce sends 2 T N numbers, pieces (T + 1) N.
TARGETS = [
    Target(f"{world} processes, {LIMITED}", tasks, 4 * 10**6, 0.95 * 2 * tasks / (tasks + 1), ONE_MATRIX, faster=True)
    for world in WORLDS
    for tasks in (2, 8)
]


def contenders(tasks: int, size: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return for each contender what prepares a call, and the call."""
    parameters = [torch.nn.Parameter(torch.zeros(size // TENSORS)) for _ in range(TENSORS)]
    optimizer = gs.SurgeryOptimizer(torch.optim.SGD(parameters), "pcgrad", shared=parameters)
    rows = [[torch.randn_like(p) for p in parameters] for _ in range(tasks)]
    world, aggregator = distributed.get_world_size(), PCGrad()

    def collect() -> None:
        optimizer.zero_grad()
        optimizer.collect(
            [torch.stack([(p * g).sum() for p, g in zip(parameters, row, strict=True)]).sum() for row in rows]
        )

    def assign(direction: Tensor) -> None:
        for p, grad in zip(parameters, direction.split(size // TENSORS), strict=True):
            p.grad = grad

    def peer() -> None:
        matrix = torch.stack([torch.cat(row) for row in rows]).div_(world)
        distributed.all_reduce(matrix)
        assign(aggregator(matrix))

    def plain() -> None:
        total = torch.cat(rows[0]).div_(world)
        distributed.all_reduce(total)
        assign(total)

    return {
        OURS: (collect, optimizer.combine),
        ONE_MATRIX: (optimizer.zero_grad, peer),
        SUM: (optimizer.zero_grad, plain),
    }


def measure(rank: int, world: int, network: str, quick: bool, folder: str) -> None:
    """Measure all cases of a network as one of several processes; the first one stores the rows."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    rows = []
    for tasks, size in CASES[network]:
        size = size // 100 if quick else size

        def sample(prepare: Callable[[], object], call: Callable[[], object]) -> float:
            prepare()
            distributed.barrier()
            begin = time.perf_counter()
            call()
            distributed.barrier()
            return time.perf_counter() - begin

        calls = {
            name: lambda pair=pair: sample(*pair)  # type: ignore[misc]
            for name, pair in contenders(tasks, size).items()
        }
        for call in calls.values():
            call()
        times = take_turns(calls, dict.fromkeys(calls, 2 if quick else ROUNDS))
        for name, seconds in times.items():
            low, median, high = (1e3 * numpy.quantile(seconds, (0.2, 0.5, 0.8))).tolist()
            stage = f"{world} processes, {network}"
            rows.append(Row(stage, name, tasks, size, "float32", median, low, high, len(seconds)))
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps([asdict(row) for row in rows]))
    distributed.destroy_process_group()


def rows_of(network: str, quick: bool) -> list[Row]:
    """Measure on a network, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.processes", "--measure", network, folder, *["--quick"] * quick]
        if network == LIMITED:
            command = ["unshare", "--net", "sh", "-c", f'{LIMIT} && exec "$@"', "sh", *command]
        subprocess.run(command, check=True)
        return [Row(**row) for world in WORLDS for row in json.loads(Path(folder, f"{world}.json").read_text())]


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(prog="python -m bench.processes", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--output", type=Path, help=f"where the JSON goes; a whole run's: {RESULTS.name}")
    parser.add_argument("--measure", nargs=2, metavar=("NETWORK", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        network, folder = options.measure
        for world in WORLDS:
            multiprocessing.spawn(measure, (world, network, options.quick, folder), world)  # type: ignore[no-untyped-call]
        return
    origin = provenance(torch.device("cpu"))
    rows = [row for network in CASES for row in rows_of(network, options.quick)]
    print_rows(Console(width=124), rows, origin["machine"])
    verdicts = judge(rows, TARGETS)
    print_targets(verdicts)
    if output := options.output or (None if options.quick else RESULTS):
        write(output, f"python -m bench.processes{' --quick' if options.quick else ''}", origin, rows, verdicts)


if __name__ == "__main__":
    main()
