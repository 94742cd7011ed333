# SPDX-License-Identifier: MIT
"""What the streaming kernels are told of the gradients: addresses, and which program takes which columns.

A piece is a run of columns that lies together in every task's memory: the flat form's [T, N] or one parameter of the
list form. Pieces are cut into blocks, and runs of blocks, across pieces but not across segments, make slots, one for
each program. The cut depends on the gradients alone, so the order of summation is the same on every GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._compiling import capturing
from ..._gradients import DTYPES, TaskGradients

VECTOR_BYTES = 16


@dataclass(slots=True, eq=False)
class Pieces:
    """The pieces of one dtype, ordered by segment."""

    dtype: torch.dtype
    aligned: bool
    """Whether every row and every output starts at a multiple of 16 bytes."""
    columns: np.ndarray
    segments: np.ndarray
    rows: np.ndarray
    """int64 [pieces, 3 + T]: columns, segment, the output's address, the rows' addresses, 0 where there is none."""


class _Parameters(NamedTuple):
    """What the list form says of its parameters."""

    dtypes: np.ndarray
    """Places in ``DTYPES``."""
    columns: np.ndarray
    """0 where no task has a gradient."""
    addresses: np.ndarray
    """[P, T], 0 where there is none."""


def pieces_of(grads: TaskGradients, out: Tensor | Sequence[Tensor] | None = None, listed: bool = True) -> list[Pieces]:
    """List the pieces by dtype; ``out`` holds the outputs, where there are any.

    Unless ``listed``, a matrix is the only piece, and has no rows: its addresses are arguments of the kernels.
    """
    if grads.matrix is None:
        return _pieces_of_lists(grads, None if out is None else [o.data_ptr() for o in out])
    matrix, target = grads.matrix, out.data_ptr() if isinstance(out, Tensor) else 0
    columns, pitch = matrix.shape[1], matrix.stride(0) * matrix.element_size()
    if not columns:
        return []
    if listed:
        return [_pieces_of_matrix(matrix, grads.segments or [0, columns], pitch, target)]
    bits = matrix.data_ptr() | target | (pitch if len(matrix) > 1 else 0)
    aligned, none = bits % VECTOR_BYTES == 0, np.zeros((1, 0), np.int64)
    return [Pieces(matrix.dtype, aligned, np.array([columns]), np.zeros(1, np.int64), none)]


def _pieces_of_matrix(matrix: Tensor, offsets: list[int], pitch: int, target: int) -> Pieces:
    columns, begins = np.diff(offsets), np.array(offsets[:-1]) * matrix.element_size()
    outputs = begins + target if target else np.zeros_like(begins)
    addresses = matrix.data_ptr() + begins[:, None] + np.arange(len(matrix)) * pitch
    rows = np.column_stack([columns, np.arange(len(columns)), outputs, addresses])
    return _pieces(matrix.dtype, rows[columns > 0])


def _pieces_of_lists(grads: TaskGradients, outputs: list[int] | None) -> list[Pieces]:
    if not grads.tabulated:
        grads.tabulated.append(_tabulate(replace(grads, params=None)))
    read: _Parameters = grads.tabulated[0]
    if grads.params is not None:
        read = _Parameters(*(values[grads.params] for values in read))
    zeros = np.zeros_like(read.columns)
    rows = np.column_stack(
        [read.columns, grads.segments or zeros, zeros if outputs is None else outputs, read.addresses]
    )
    filled = read.columns > 0
    present = sorted(set(read.dtypes[filled].tolist()))
    return [_pieces(DTYPES[k], rows[filled & (read.dtypes == k)]) for k in present]


def _tabulate(grads: TaskGradients) -> _Parameters:
    likes = grads.like
    addresses = np.array([0 if g is None else g.data_ptr() for g in grads.entries], np.int64)
    return _Parameters(
        np.array([0 if like is None else DTYPES.index(like.dtype) for like in likes]),
        np.array([0 if like is None else like.numel() for like in likes], np.int64),
        addresses.reshape(grads.num_tasks, len(likes)).T,
    )


def _pieces(dtype: torch.dtype, rows: np.ndarray) -> Pieces:
    rows = rows[np.argsort(rows[:, 1], kind="stable")]
    aligned = not (rows[:, 2:] % VECTOR_BYTES).any()
    return Pieces(dtype, aligned, rows[:, 0], rows[:, 1], rows)


def cut(pieces: Pieces, block: int, max_slots: int, least_blocks: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Cut the pieces into about ``max_slots`` equal slots of at least ``least_blocks`` blocks.

    Returns:
        int64 [slots, 4]: the first piece, the first block in it, the number of blocks, and 0 for the caller's use; and
        the segment of each slot. Both are for reading only: pieces of the same sizes get the same arrays.
    """
    return _cut(pieces.columns.tobytes(), pieces.segments.tobytes(), block, max_slots, least_blocks)


@lru_cache(16)
def _cut(
    columns: bytes, of_pieces: bytes, block: int, max_slots: int, least_blocks: int
) -> tuple[np.ndarray, np.ndarray]:
    blocks = -(-np.frombuffer(columns, np.int64) // block)
    first = np.concatenate([[0], np.cumsum(blocks)])
    length = max(least_blocks, -(-int(first[-1]) // max_slots))
    segments, begins = np.unique(np.frombuffer(of_pieces, np.int64), return_index=True)
    begin, end = first[begins], first[np.append(begins[1:], len(blocks))]
    counts = -(-(end - begin) // length)
    which = np.repeat(np.arange(len(segments)), counts)
    start = begin[which] + (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    piece = np.searchsorted(first, start, side="right") - 1
    count = np.minimum(length, end[which] - start)
    slots, of_slots = np.stack([piece, start - first[piece], count, np.zeros_like(count)], 1), segments[which]
    slots.flags.writeable = of_slots.flags.writeable = False
    return slots, of_slots


# What captured graphs read when they are replayed, which may be at any time: kept as long as the process lives.
_captured: list[Tensor] = []


def to_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy int64 arrays to the device in one piece, without synchronising; returned flat."""
    table = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    if device.type != "cpu":
        table = table.pin_memory()
        if capturing(device):
            _captured.append(table)
        table = table.to(device, non_blocking=True)
    return list(table.split([array.size for array in arrays]))
