# SPDX-License-Identifier: MIT
"""The rules that work coordinate by coordinate, in plain PyTorch: a chunk of columns of all tasks at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._extension import Rule
from .._gradients import TaskGradients
from .._philox import coordinate_uniforms

CHUNK_COLUMNS = 1 << 14


def combine_by_rule(grads: TaskGradients, rule: Rule, out: Tensor | list[Tensor], accumulate: bool) -> None:
    """Write (or add) the direction of a rule; GradDrop's step counter grows by 1."""
    name, arguments = rule
    for coordinate, values, target in _chunks(grads, out):
        if name == "graddrop":
            direction = _graddrop(values, coordinate, *arguments)
        else:
            direction = _trimmed_mean(values, *arguments)
        direction = torch.where(values.isfinite().all(0), direction, torch.nan)
        target.copy_(target.double() + direction if accumulate else direction)
    if name == "graddrop":
        arguments[1].add_(1)


def _graddrop(values: Tensor, coordinate: int, seed: int, step: Tensor, leak: Tensor | None) -> Tensor:
    """GradDrop, Algorithm 1: P > u is (1 - u) p > u n for the sums p and n of the values above and below 0."""
    above, below = values.clamp(min=0), values.clamp(max=0)
    positive, negative = _sum(above), -_sum(below)
    u = coordinate_uniforms(coordinate, values.shape[1], seed, step, values.device)
    up, down = (1 - u) * positive, u * negative
    direction = torch.where(up > down, positive, 0) - torch.where(up < down, negative, 0)
    if leak is None:
        return direction
    dropped = torch.where(up > down, 0, above) + torch.where(up < down, 0, below)
    return direction + _sum(leak[:, None] * dropped)


def _trimmed_mean(values: Tensor, num_trimmed: int) -> Tensor:
    """Return the mean of the values that are neither among the k largest nor among the k least."""
    middle = values.sort(0).values[num_trimmed : len(values) - num_trimmed]
    return _sum(middle) / len(middle)


def _sum(rows: Tensor) -> Tensor:
    """Return the sum of the rows, added in ascending order in every column."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total


def _chunks(grads: TaskGradients, out: Tensor | list[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (number of the first coordinate, float64 values [T, <= a chunk], where the output goes)."""
    if grads.matrix is not None:
        assert isinstance(out, Tensor)
        params: list[tuple[list[Tensor | None], Tensor]] = [(list(grads.matrix.unbind()), out)]
    else:
        entries = grads.entries
        params = [(entries[p :: len(out)], target) for p, target in enumerate(out)]
    coordinate = 0
    for rows, target in params:
        flat = [None if row is None else _in_memory_order(row) for row in rows]
        zeros = torch.zeros((), dtype=target.dtype, device=target.device)
        written = _in_memory_order(target)
        for begin in range(0, len(written), CHUNK_COLUMNS):
            part = slice(begin, begin + CHUNK_COLUMNS)
            columns = len(written[part])
            values = [zeros.expand(columns) if row is None else row[part] for row in flat]
            yield coordinate + begin, torch.stack(values).double(), written[part]
        coordinate += len(written)


def _in_memory_order(dense: Tensor) -> Tensor:
    return dense.as_strided((dense.numel(),), (1,))
