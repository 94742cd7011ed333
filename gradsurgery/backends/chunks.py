# SPDX-License-Identifier: MIT
"""The gradients in float64, a chunk of columns of all tasks at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._gradients import TaskGradients


class Chunk(NamedTuple):
    """Columns of one segment, from one parameter or several."""

    segment: int
    coordinate: int
    """The number of the first column."""
    values: Tensor
    """float64 [T, columns], zeros where a task has no gradient; overwritten by the next chunk."""
    targets: list[Tensor]
    """Where these columns of the direction go, one tensor after the other."""

    def write(self, direction: Tensor, accumulate: bool) -> None:
        """Write the float64 direction of these columns to the targets, or add it."""
        parts = direction.split([len(target) for target in self.targets])
        for target, part in zip(self.targets, parts, strict=True):
            target.copy_(target.double() + part if accumulate else part)


class _Piece(NamedTuple):
    """Columns of one parameter."""

    segment: int
    rows: list[Tensor]
    targets: list[Tensor]
    """One tensor, or none."""


def chunks(grads: TaskGradients, out: Tensor | list[Tensor] | None = None) -> Iterator[Chunk]:
    """Yield all columns; ``out`` is where the direction goes."""
    # 4 MB on the CPU, for its caches; elsewhere 32 MB, for few launches.
    elements = 1 << (19 if grads.device.type == "cpu" else 22)
    width, coordinate = max(4096, elements // grads.num_tasks), 0
    matrix, likes = grads.matrix, [] if grads.rows is None else grads.like
    total = sum(like.numel() for like in likes if like is not None) if matrix is None else matrix.shape[1]
    buffer = torch.empty(grads.num_tasks, min(width, total), dtype=torch.float64, device=grads.device)
    if matrix is not None:
        for segment, (begin, end) in enumerate(pairwise(grads.segments or [0, total])):
            for coordinate in range(begin, end, width):
                part = slice(coordinate, min(coordinate + width, end))
                values = buffer[:, : part.stop - coordinate].copy_(matrix[:, part])
                yield Chunk(segment, coordinate, values, [] if out is None else [out[part]])  # type: ignore[list-item]
        return
    for run in _runs(_pieces(grads, likes, out, width), width):
        columns = sum(len(piece.rows[0]) for piece in run)
        values = buffer[:, :columns]
        for t, row in enumerate(values.unbind()):
            row.copy_(run[0].rows[t] if len(run) == 1 else torch.cat([piece.rows[t] for piece in run]))
        yield Chunk(run[0].segment, coordinate, values, [target for piece in run for target in piece.targets])
        coordinate += columns


def _pieces(
    grads: TaskGradients, likes: list[Tensor | None], out: Tensor | list[Tensor] | None, width: int
) -> Iterator[_Piece]:
    """Yield the parameters of the list form in pieces of at most ``width`` columns."""
    entries = grads.entries
    for p, like in enumerate(likes):
        if like is None:
            continue
        zeros = torch.zeros((), dtype=like.dtype, device=like.device).expand(like.numel())
        rows = [zeros if entry is None else _flat(entry) for entry in entries[p :: len(likes)]]
        targets = [] if out is None else [_flat(out[p])]
        segment = grads.segments[p] if grads.segments else 0
        if like.numel() <= width:
            yield _Piece(segment, rows, targets)
            continue
        for begin in range(0, like.numel(), width):
            part = slice(begin, begin + width)
            yield _Piece(segment, [row[part] for row in rows], [target[part] for target in targets])


def _runs(pieces: Iterable[_Piece], width: int) -> Iterator[list[_Piece]]:
    """Yield runs of pieces of one segment, of at most ``width`` columns together."""
    run: list[_Piece] = []
    columns = 0
    for piece in pieces:
        columns += len(piece.rows[0])
        if run and (columns > width or piece.segment != run[0].segment):
            yield run
            run, columns = [], len(piece.rows[0])
        run.append(piece)
    if run:
        yield run


def _flat(dense: Tensor) -> Tensor:
    """Return the elements in the order of memory."""
    return dense.view(-1) if dense.is_contiguous() else dense.as_strided((dense.numel(),), (1,))
