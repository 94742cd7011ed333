# SPDX-License-Identifier: MIT
"""What the streaming kernels are told of the gradients: addresses, and which program takes which columns.

A piece is a run of columns that lies together in every task's memory: the flat form's [T, N] or one parameter of the
list form. Pieces are cut into blocks, and runs of blocks, across pieces but not across segments, make slots, one for
each program. The cut depends on the gradients alone, so the order of summation is the same on every GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

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
    """Whether every row of every piece starts at a multiple of 16 bytes."""
    columns: np.ndarray
    segments: np.ndarray
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
    rows: dict[torch.dtype, list[list[int]]] = {}
    if grads.matrix is not None:
        matrix = grads.matrix
        size, address = matrix.element_size(), matrix.data_ptr()
        target = out.data_ptr() if isinstance(out, Tensor) else None
        offsets = grads.segments or [0, matrix.shape[1]]
        rows[matrix.dtype] = [
            [end - begin, segment, 0 if target is None else target + begin * size]
            + [address + (t * matrix.stride(0) + begin) * size for t in range(grads.num_tasks)]
            for segment, (begin, end) in enumerate(pairwise(offsets))
            if begin < end
        ]
    else:
        all_entries = grads.entries
        params = len(all_entries) // grads.num_tasks
        for p in range(params):
            entries = all_entries[p::params]
            like = next((entry for entry in entries if entry is not None), None)
            if like is None or like.numel() == 0:
                continue
            segment = grads.segments[p] if grads.segments else 0
            target = 0 if out is None else out[p].data_ptr()
            addresses = [0 if entry is None else entry.data_ptr() for entry in entries]
            rows.setdefault(like.dtype, []).append([like.numel(), segment, target, *addresses])
    return [_pieces(dtype, np.array(of_dtype, dtype=np.int64)) for dtype, of_dtype in rows.items() if of_dtype]


@lru_cache
def one_piece(dtype: torch.dtype, columns: int, aligned: bool) -> Pieces:
    """Return the piece of a matrix, the same object each time."""
    return Pieces(dtype, aligned, np.array([columns]), np.zeros(1, np.int64), np.zeros((1, 0), np.int64))


def _pieces(dtype: torch.dtype, rows: np.ndarray) -> Pieces:
    rows = rows[np.argsort(rows[:, 1], kind="stable")]
    aligned = not (rows[:, 2:] % VECTOR_BYTES).any()
    return Pieces(dtype, aligned, rows[:, 0], rows[:, 1], rows)


def cut(pieces: Pieces, block: int, max_slots: int, least_blocks: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Cut the pieces into about ``max_slots`` equal slots of at least ``least_blocks`` blocks.

    Returns:
        int64 [slots, 4]: the first piece, the first block in it, the number of blocks, and 0 for the caller's use; and
        the segment of each slot.
    """
    blocks = -(-pieces.columns // block)
    first = np.concatenate([[0], np.cumsum(blocks)])
    length = max(least_blocks, -(-int(first[-1]) // max_slots))
    segments, begins = np.unique(pieces.segments, return_index=True)
    begin, end = first[begins], first[np.append(begins[1:], len(blocks))]
    counts = -(-(end - begin) // length)
    which = np.repeat(np.arange(len(segments)), counts)
    start = begin[which] + (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    piece = np.searchsorted(first, start, side="right") - 1
    count = np.minimum(length, end[which] - start)
    return np.stack([piece, start - first[piece], count, np.zeros_like(count)], 1), segments[which]


cut_once = lru_cache(cut)
"""``cut`` with a cache, for pieces that recur."""

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
