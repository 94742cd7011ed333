# SPDX-License-Identifier: MIT
"""Time the contenders of a case in turns: replays of CUDA graphs between events, or calls on the host's clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy
import torch

from .timing import OURS
from .turns import take_turns

TRITON = "gradsurgery, triton"
"""Our other backend for GPUs."""
FLAT = "gradsurgery, aligned [T, N]"
"""The same bytes as one aligned matrix, for comparison with a form that is harder to read."""

MIN_ROUNDS, MAX_ROUNDS = 3, 50
SLOW_S = 0.5
"""If a sample takes longer, it is the only one."""
MIN_GRAPH_S = 400e-6
"""Calls are repeated within a graph until it takes this long, so that the start of a replay does not matter."""
MIN_SAMPLE_S = 1e-3
LONG_S = 4e-4
"""If a call takes longer, two sets of inputs are enough: it reads more memory than the caches hold, or waits for the
host, and then it does not matter whether its inputs are in the cache."""
HOST_ROUNDS, HOST_CALLS = 7, 50

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


@dataclass
class Spec:
    """What is measured on which inputs."""

    stage: str
    form: str
    """flat, list or misaligned gradients; solve: work on T x T alone."""
    tasks: int
    size: int | None
    """N, None without gradients."""
    dtype: str
    cache: str
    """cold: sets of inputs, together twice as large as the level-2 cache, take turns; hot: one set is repeated."""
    batch: int = 1
    """Problems in one call."""

    @property
    def bytes(self) -> int:
        """The size of J."""
        return 0 if self.size is None else self.tasks * self.size * getattr(torch, self.dtype).itemsize


@dataclass
class Case:
    """Contenders that compute the same thing; each has one call per set of inputs."""

    spec: Spec
    calls: dict[str, list[Call]]
    errors: dict[str, Callable[[], float]]
    """Relative error of a contender's result against a float64 one."""
    read_bytes: int = 0
    """The bytes that a stage that only reads has to move; the next field is for one that writes as well."""
    copy_bytes: int = 0


@dataclass
class Row(Spec):
    """What was measured of one contender in one case; times in microseconds, None where there is nothing."""

    contender: str = OURS
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    rounds: int = 0
    host_us: float | None = None
    """The host's time for a call without a graph, if inputs are hot."""
    floor_us: float | None = None
    x_floor: float | None = None
    x_flat: float | None = None
    x_ours: float | None = None
    """Another contender's time over ours."""
    error: float | None = None
    note: str = ""


def measure(case: Case, device: torch.device, seconds: float, ceilings: dict[str, float]) -> list[Row]:
    """Return one row per contender, each measured for about ``seconds``."""
    sampler = graph_sampler if device.type == "cuda" else eager_sampler
    rows = {name: Row(**asdict(case.spec), contender=name) for name in case.calls}
    samplers = {}
    for name, calls in case.calls.items():
        try:
            samplers[name] = sampler(calls, device)
            if name in case.errors:
                rows[name].error = case.errors[name]()
        except Exception as error:  # of whatever type a compiler raises
            if name == OURS:
                raise
            samplers.pop(name, None)
            rows[name].note = failure(error)
    floor_us = (case.read_bytes / ceilings["read GB/s"] + case.copy_bytes / ceilings["copy GB/s"]) / 1e3
    for name, times in interleave(samplers, seconds).items():
        row = rows[name]
        row.rounds = len(times)
        row.p20_us, row.median_us, row.p80_us = quantiles(times)
        if row.cache == "hot":
            row.host_us = 1e6 * _host_seconds(case.calls[name], device, seconds)
        elif floor_us:
            row.floor_us, row.x_floor = floor_us, row.median_us / floor_us
    for name in samplers:
        if name != OURS:
            rows[name].x_ours = rows[name].median_us / rows[OURS].median_us
    if FLAT in samplers:
        rows[OURS].x_flat = rows[OURS].median_us / rows[FLAT].median_us
    return list(rows.values())


def failure(error: Exception) -> str:
    """Return the note of what failed, one short line."""
    return f"failed: {(str(error) or repr(error)).splitlines()[0][:200]}"


def quantiles(times: list[float]) -> list[float]:
    """Return the 20th percentile, the median and the 80th percentile in microseconds."""
    return (1e6 * numpy.quantile(times, (0.2, 0.5, 0.8))).tolist()


def interleave(samplers: dict[Name, Callable[[], float]], seconds: float) -> dict[Name, list[float]]:
    """Return seconds per call, one value per round, the contenders in a new order in each round."""
    first: dict[Name, list[float]] = {}
    planned = {}
    for name, sample in samplers.items():
        begin = time.perf_counter()
        once = sample()
        took = time.perf_counter() - begin
        first[name] = [once] if took > SLOW_S else []
        planned[name] = 0 if took > SLOW_S else min(max(MIN_ROUNDS, int(seconds / took)), MAX_ROUNDS)
    times = take_turns(samplers, planned)
    return {name: first[name] + times[name] for name in samplers}


def graph_sampler(calls: list[Call], device: torch.device) -> Callable[[], float]:
    """Capture the calls in one graph; return a function that times one replay of it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Runs once before the capture: what a first call allocates or moves to the device must be there by then.
        for call in calls:
            call()
    torch.cuda.synchronize()
    once = _replay_seconds(_capture(calls))
    passes = math.ceil(MIN_GRAPH_S / once)
    graph = _capture(calls * passes)
    return lambda: _replay_seconds(graph) / (len(calls) * passes)


def _capture(calls: list[Call]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The first replay keeps the GPU busy while the host enqueues the second.
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def eager_sampler(calls: list[Call], device: torch.device) -> Callable[[], float]:
    """Return a function that times calls as a program without graphs makes them."""
    once = min(_pass_seconds(calls[:1], 1, device) for _ in range(2))
    taken = calls[:2] if once > LONG_S else calls
    _pass_seconds(taken[1:] or taken, 1, device)
    passes = math.ceil(MIN_SAMPLE_S / (once * len(taken)))
    return lambda: _pass_seconds(taken, passes, device)


def _pass_seconds(calls: list[Call], passes: int, device: torch.device) -> float:
    """Return seconds per call, all enqueued in a row, with one wait at the end."""
    begin = time.perf_counter()
    for _ in range(passes):
        for call in calls:
            call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / (passes * len(calls))


def _host_seconds(calls: list[Call], device: torch.device, seconds: float) -> float:
    once = min(_pass_seconds(calls, 1, device) for _ in range(2))
    passes = math.ceil(min(HOST_CALLS, seconds / HOST_ROUNDS / once) / len(calls))
    return statistics.median(_pass_seconds(calls, passes, device) for _ in range(HOST_ROUNDS))
