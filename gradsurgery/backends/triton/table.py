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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._compiling import capturing
from ..._gradients import TaskGradients

VECTOR_BYTES = 16


@dataclass(slots=True, eq=False)
class Pieces:
    """The pieces of one dtype, ordered by segment."""

    dtype: torch.dtype
    aligned: bool
    """Whether every row and every output starts at a multiple of 16 bytes."""
    columns: np.ndarray
    segments: np.ndarray
    places: np.ndarray
    """Which parameter, or which segment of the flat form, each piece is."""
    rows: np.ndarray
    """int64 [pieces, 3 + T]: columns, segment, the output's address, the rows' addresses, 0 where there is none."""


def pieces_of(grads: TaskGradients, out: Tensor | Sequence[Tensor] | None = None, listed: bool = True) -> list[Pieces]:
    """List the pieces by dtype; ``out`` holds the outputs, where there are any.

    Unless ``listed``, a matrix is the only piece, and has no rows: its addresses are arguments of the kernels.
    """
    if grads.matrix is not None and not listed:
        matrix, columns = grads.matrix, grads.matrix.shape[1]
        bits = matrix.data_ptr()
        if len(matrix) > 1:
            bits |= matrix.stride(0) * matrix.element_size()
        if isinstance(out, Tensor):
            bits |= out.data_ptr()
        return [one_piece(matrix.dtype, columns, bits % VECTOR_BYTES == 0)] if columns else []
    if grads.pieces is None:
        grads.pieces = _tabulate(grads)
    if out is None:
        return list(grads.pieces)
    if isinstance(out, Tensor):
        outputs = out.data_ptr() + np.array(grads.segments or [0]) * out.element_size()
    else:
        outputs = np.array([0 if o is None else o.data_ptr() for o in out], np.int64)
    return [_writing_to(outputs[pieces.places], pieces) for pieces in grads.pieces]


@lru_cache
def one_piece(dtype: torch.dtype, columns: int, aligned: bool) -> Pieces:
    """Return the piece of a matrix, the same object each time."""
    zero = np.zeros(1, np.int64)
    return Pieces(dtype, aligned, np.array([columns]), zero, zero, np.zeros((1, 0), np.int64))


def _tabulate(grads: TaskGradients) -> list[Pieces]:
    """Return the pieces without outputs."""
    if grads.matrix is not None:
        matrix, size = grads.matrix, grads.matrix.element_size()
        offsets = np.array(grads.segments or [0, matrix.shape[1]])
        columns, segments = np.diff(offsets), np.arange(len(offsets) - 1)
        dtypes: list[Any] = [matrix.dtype] * len(columns)
        starts = matrix.data_ptr() + np.arange(len(matrix)) * (matrix.stride(0) * size)
        addresses = offsets[:-1, None] * size + starts
    else:
        likes = grads.like
        columns = np.array([0 if like is None else like.numel() for like in likes], np.int64)
        segments = np.array(grads.segments or [0] * len(likes))
        dtypes = [None if like is None else like.dtype for like in likes]
        entries = np.array([0 if g is None else g.data_ptr() for g in grads.entries], np.int64)
        addresses = entries.reshape(grads.num_tasks, len(likes)).T
    rows = np.column_stack([columns, segments, np.zeros_like(columns), addresses])
    by_dtype: dict[torch.dtype, list[int]] = {}
    for place in np.flatnonzero(columns).tolist():
        by_dtype.setdefault(dtypes[place], []).append(place)
    return [_pieces(dtype, np.array(places), rows[places]) for dtype, places in by_dtype.items()]


def _pieces(dtype: torch.dtype, places: np.ndarray, rows: np.ndarray) -> Pieces:
    order = np.argsort(rows[:, 1], kind="stable")
    rows = rows[order]
    return Pieces(dtype, not (rows[:, 3:] % VECTOR_BYTES).any(), rows[:, 0], rows[:, 1], places[order], rows)


def _writing_to(outputs: np.ndarray, pieces: Pieces) -> Pieces:
    rows = pieces.rows.copy()
    rows[:, 2] = outputs
    return replace(pieces, aligned=pieces.aligned and not (outputs % VECTOR_BYTES).any(), rows=rows)


def cut(pieces: Pieces, block: int, max_slots: int, least_blocks: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Cut the pieces into about ``max_slots`` equal slots of at least ``least_blocks`` blocks.

    Returns:
        int64 [slots, 4]: the first piece, the first block in it, the number of blocks, and 0 for the caller's use; and
        the segment of each slot. Both are for reading only: pieces of the same sizes get the same arrays.
    """
    return _cut(pieces.columns.tobytes(), pieces.segments.tobytes(), block, max_slots, least_blocks)


@lru_cache
def _cut(columns: bytes, owners: bytes, block: int, max_slots: int, least_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = -(-np.frombuffer(columns, np.int64) // block)
    first = np.concatenate([[0], np.cumsum(blocks)])
    length = max(least_blocks, -(-int(first[-1]) // max_slots))
    segments, begins = np.unique(np.frombuffer(owners, np.int64), return_index=True)
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
