# SPDX-License-Identifier: MIT
"""The gradients in parts that caches hold: as they are, or as matrices [T, columns] of float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._compiling import is_traced, is_watched
from .._gradients import TaskGradients


class Part(NamedTuple):
    """Columns of one parameter, or of one segment of the flat form."""

    segment: int
    coordinate: int
    """The number of the first column."""
    rows: Sequence[Tensor | None]
    """[columns] for each task, None where it has no gradient; the elements are in the order of memory."""
    like: Tensor
    """One of the rows."""
    target: Tensor | None
    """Where these columns of the direction go."""

    def write(self, direction: Tensor, accumulate: bool) -> None:
        """Write the float64 direction of these columns to the target, or add it."""
        target = self.target
        assert target is not None
        target.copy_(target.double() + direction if accumulate else direction)


class Chunk(NamedTuple):
    """Columns of one segment, from one parameter or several."""

    parts: list[Part]
    values: Tensor
    """float64 [T, columns], zeros where a task has no gradient; the next chunk overwrites them."""

    def write(self, direction: Tensor, accumulate: bool) -> None:
        """Write the float64 direction of these columns to the targets, or add it."""
        columns = direction.split([part.like.numel() for part in self.parts])
        for part, values in zip(self.parts, columns, strict=True):
            part.write(values, accumulate)


def parts(grads: TaskGradients, out: Tensor | list[Tensor] | None, width: int) -> Iterator[Part]:
    """Yield parts of at most ``width`` columns; whole parameters or segments while a function is traced."""
    coordinate = 0
    for segment, rows, target in _whole(grads, out):
        like = next(row for row in rows if row is not None)
        columns = like.numel()
        if is_traced() or columns <= width:
            yield Part(segment, coordinate, rows, like, target)
        else:
            for begin in range(0, columns, width):
                cut = slice(begin, begin + width)
                yield Part(
                    segment,
                    coordinate + begin,
                    [None if row is None else row[cut] for row in rows],
                    like[cut],
                    None if target is None else target[cut],
                )
        coordinate += columns


def chunks(grads: TaskGradients, out: Tensor | list[Tensor] | None = None) -> Iterator[Chunk]:
    """Yield all columns in chunks; while a function is traced, a parameter or segment each."""
    # 4 MB on the CPU; elsewhere 32 MB, for few launches. Matrices of fewer columns would take as long as larger ones.
    width = max(4096, (1 << (19 if grads.device.type == "cpu" else 22)) // grads.num_tasks)
    found, watched = parts(grads, out, width), is_watched()
    buffer = torch.empty(grads.num_tasks, 0, dtype=torch.float64, device=grads.device)
    for run in ([part] for part in found) if is_traced() else _runs(found, width):
        rows = [_row(run, t) for t in range(grads.num_tasks)]
        if watched:  # a transform cannot write to memory from outside
            yield Chunk(run, torch.stack(rows).double())
            continue
        if buffer.shape[1] < len(rows[0]):
            buffer = torch.empty(grads.num_tasks, len(rows[0]), dtype=torch.float64, device=grads.device)
        values = buffer[:, : len(rows[0])]
        for row, target in zip(rows, values.unbind(), strict=True):
            target.copy_(row)
        yield Chunk(run, values)


def _whole(
    grads: TaskGradients, out: Tensor | list[Tensor] | None
) -> Iterator[tuple[int, Sequence[Tensor | None], Tensor | None]]:
    """Yield each parameter's, or each segment's, number of the segment, rows and target."""
    if grads.matrix is not None:
        for segment, (begin, end) in enumerate(pairwise(grads.segments or [0, grads.matrix.shape[1]])):
            yield segment, grads.matrix[:, begin:end].unbind(), None if out is None else out[begin:end]  # type: ignore[misc]
        return
    entries = grads.entries
    params = len(entries) // grads.num_tasks
    for p in range(params):
        rows = [None if entry is None else _in_memory_order(entry) for entry in entries[p::params]]
        if any(row is not None for row in rows):
            yield grads.segments[p] if grads.segments else 0, rows, None if out is None else _in_memory_order(out[p])


def _runs(all_parts: Iterable[Part], width: int) -> Iterator[list[Part]]:
    """Yield runs of parts of one segment, of at most ``width`` columns together."""
    run: list[Part] = []
    columns = 0
    for part in all_parts:
        if run and (columns + part.like.numel() > width or part.segment != run[0].segment):
            yield run
            run, columns = [], 0
        run.append(part)
        columns += part.like.numel()
    if run:
        yield run


def _row(run: list[Part], t: int) -> Tensor:
    """Return a task's row of a run of parts."""
    rows = [part.like.new_zeros(()).expand_as(part.like) if part.rows[t] is None else part.rows[t] for part in run]
    return rows[0] if len(rows) == 1 else torch.cat(rows)  # type: ignore[arg-type, return-value]


def _in_memory_order(dense: Tensor) -> Tensor:
    """Return the elements [numel] as they lie in memory; not all subclasses have ``as_strided``."""
    return dense.view(-1) if dense.is_contiguous() else dense.as_strided((dense.numel(),), (1,))
