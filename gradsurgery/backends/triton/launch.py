# SPDX-License-Identifier: MIT
"""Launches of the streaming kernels: grids, tables and workspaces."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._gradients import TaskGradients
from . import combine as combine_kernels
from . import gram as gram_kernels
from . import products, version
from .table import Pieces, cut, pieces_of, to_device
from .tuning import COMBINE, Config, gram_config, measured

_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_MODES = {"rows": products.ROWS, "float64": products.FLOAT64, "float32": products.FLOAT32}
# Programs of a streaming kernel: a multiple of many GPUs' multiprocessors, and enough warps to fill them.
_GRAM_SLOTS = {"rows": 1056, 16: 1056, 32: 1056, 64: 264, 128: 264}
_COMBINE_SLOTS = 1056
_ROWS_AT_MOST = 8


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current, where Triton launches."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@lru_cache
def fast_float64(device: torch.device) -> bool:
    """Whether the device adds float64 at no less than a quarter of float32's rate; True in the interpreter."""
    if device.type == "cpu":
        return True
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return name.startswith(("gfx90a", "gfx94", "gfx950"))
    return torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))


@lru_cache
def float64_dot(device: torch.device) -> bool:
    """Whether Triton multiplies float64 matrices there: for AMD's GPUs and Blackwell's 10.x from version 3.8 on."""
    if device.type == "cpu" or version() >= (3, 8):
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(device)[0] != 10


def arithmetic_of(dtype: torch.dtype, num_tasks: int, device: torch.device) -> tuple[str, int]:
    """Return how the Gram kernel takes products, and the number of tasks that it is compiled for."""
    fast = fast_float64(device)
    if num_tasks <= _ROWS_AT_MOST and (fast or dtype is torch.float64):
        return "rows", num_tasks
    tasks = max(16, triton.next_power_of_2(num_tasks))
    wide = dtype is torch.float64 or (fast and float64_dot(device) and dtype is torch.float32)
    return "float64" if wide else "float32", tasks


class _Launch(NamedTuple):
    pieces: Pieces
    arithmetic: str
    tasks: int
    config: Config
    slots: np.ndarray
    segments: np.ndarray


def gram(grads: TaskGradients, out: Tensor, config: Config | None = None) -> None:
    """Write the Gram matrices; ``config`` overrides the table's."""
    num_tasks, device = grads.num_tasks, grads.device
    num_segments = out.numel() // num_tasks**2
    listed = grads.matrix is None or num_segments > 1
    launches = [_plan(pieces, num_tasks, device, config, listed) for pieces in pieces_of(grads, listed=listed)]
    first_slots, tables = out, [out] * (2 * len(launches))  # not read
    num_slots = sum(len(launch.slots) for launch in launches)
    if listed:
        first = _place(launches, num_segments)
        arrays = [first, *(array for launch in launches for array in (launch.pieces.rows, launch.slots))]
        first_slots, *tables = to_device(arrays, device)
    partials = torch.empty(num_slots * num_tasks**2, dtype=torch.float64, device=device)
    mirrored = any(launch.arithmetic == "float32" and launch.pieces.dtype is torch.float32 for launch in launches)
    with on(device):
        for k, launch in enumerate(launches):
            gram_kernels.slot_sums[(len(launch.slots), 1 if launch.tasks <= products.SIDE.value else 3)](
                partials,
                *_flat(grads, listed),
                num_tasks,
                tables[2 * k],
                tables[2 * k + 1],
                int(launch.slots[0, 2]),
                LISTED=listed,
                TASKS=launch.tasks,
                DTYPE=_DTYPES[launch.pieces.dtype],
                MODE=_MODES[launch.arithmetic],
                DOT=float64_dot(device),
                MIRRORED=mirrored,
                ALIGNED=launch.pieces.aligned,
                BLOCK=launch.config.block,
                STAGES=launch.config.num_stages,
                num_warps=launch.config.num_warps,
                num_stages=1,
            )
        entries = 4 if num_tasks <= _ROWS_AT_MOST else 16
        gram_kernels.sum_slots[(num_segments, triton.cdiv(num_tasks**2, entries))](
            out,
            partials,
            first_slots,
            num_slots,
            num_tasks,
            SEGMENTED=listed,
            MIRRORED=mirrored,
            SLOTS=2048 // entries,
            ENTRIES=entries,
            num_warps=8,
        )


def _plan(pieces: Pieces, num_tasks: int, device: torch.device, config: Config | None, listed: bool) -> _Launch:
    arithmetic, tasks = arithmetic_of(pieces.dtype, num_tasks, device)
    if config is None:
        key = ("gram", arithmetic, tasks, pieces.dtype)
        fixed = gram_config(arithmetic, tasks, pieces.dtype)
        if arithmetic == "float64" and not float64_dot(device):
            fixed = fixed._replace(block=4)
        with on(device):
            config = measured(key, device, fixed, partial(_try_gram, num_tasks, pieces.dtype, device))
    # Fewer columns than 8 T cost less than the slot's own sums.
    least = triton.cdiv(8 * num_tasks, config.block)
    most = _GRAM_SLOTS["rows" if arithmetic == "rows" else tasks]
    slots, segments = cut(pieces, config.block, most, least)
    if listed:
        slots = slots.copy()  # for _place to number
    return _Launch(pieces, arithmetic, tasks, config, slots, segments)


def _place(launches: list[_Launch], num_segments: int) -> np.ndarray:
    """Number the slots so that a segment's are together, whatever their dtypes; return each segment's first number."""
    owners = np.concatenate([np.zeros(0, np.int64), *(launch.segments for launch in launches)])
    places = np.argsort(np.argsort(owners, kind="stable"))
    for launch in launches:
        launch.slots[:, 3], places = places[: len(launch.slots)], places[len(launch.slots) :]
    return np.searchsorted(np.sort(owners), np.arange(num_segments + 1))


def combine(
    grads: TaskGradients,
    weights: Tensor,
    out: Tensor | list[Tensor],
    accumulate: bool,
    config: Config | None = None,
) -> None:
    """Write the directions; ``config`` overrides the table's."""
    num_tasks, device = grads.num_tasks, grads.device
    listed = grads.matrix is None or weights.dim() > 1
    launches = []
    for pieces in pieces_of(grads, out, listed):
        key = ("combine", num_tasks, pieces.dtype)
        with on(device):
            chosen = config or measured(key, device, COMBINE, partial(_try_combine, num_tasks, pieces.dtype, device))
        slots, _ = cut(pieces, chosen.block, _COMBINE_SLOTS)
        launches.append((pieces, chosen, slots))
    tables = [weights] * (2 * len(launches))  # not read
    if listed and launches:
        tables = to_device([array for pieces, _, slots in launches for array in (pieces.rows, slots)], device)
    with on(device):
        for k, (pieces, chosen, slots) in enumerate(launches):
            combine_kernels.weighted_sums[(len(slots),)](
                weights,
                out.data_ptr() if isinstance(out, Tensor) else 0,
                *_flat(grads, listed),
                num_tasks,
                tables[2 * k],
                tables[2 * k + 1],
                int(slots[0, 2]),
                LISTED=listed,
                ACCUMULATE=accumulate,
                DTYPE=_DTYPES[pieces.dtype],
                ALIGNED=pieces.aligned,
                BLOCK=chosen.block,
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
            )
    torch.autograd.graph.increment_version(out)


def _flat(grads: TaskGradients, listed: bool) -> tuple[int, int, int]:
    """Return the address, the bytes between rows and the columns of the flat form; 0 where a table says so."""
    if listed or grads.matrix is None:
        return 0, 0, 0
    return grads.matrix.data_ptr(), grads.matrix.stride(0) * grads.matrix.element_size(), grads.matrix.shape[1]


def _sample(num_tasks: int, dtype: torch.dtype, device: torch.device) -> TaskGradients:
    """Return random gradients for measurements, larger than a cache; torch's global generators are not used."""
    columns = (1 << 28) // (16 * num_tasks) * 16 // dtype.itemsize
    matrix = torch.randn(num_tasks, columns, generator=torch.Generator(device), device=device)
    return TaskGradients(num_tasks, 1, [], False, device, matrix.to(dtype))


def _try_gram(num_tasks: int, dtype: torch.dtype, device: torch.device) -> Callable[[Config], None]:
    grads = _sample(num_tasks, dtype, device)
    out = torch.empty(num_tasks, num_tasks, dtype=torch.float64, device=device)
    return lambda config: gram(grads, out, config)


def _try_combine(num_tasks: int, dtype: torch.dtype, device: torch.device) -> Callable[[Config], None]:
    grads = _sample(num_tasks, dtype, device)
    assert grads.matrix is not None
    out = torch.empty_like(grads.matrix[0])
    weights = torch.ones(num_tasks, dtype=torch.float64, device=device)
    return lambda config: combine(grads, weights, out, False, config)
