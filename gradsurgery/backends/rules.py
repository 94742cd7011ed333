# SPDX-License-Identifier: MIT
"""The rules that work coordinate by coordinate, in plain PyTorch: a chunk of columns of all tasks at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._compiling import cached, is_watched
from .._extension import Rule
from .._gradients import TaskGradients
from .._philox import coordinate_uniforms
from .parts import chunks


def combine_by_rule(grads: TaskGradients, rule: Rule, out: Tensor | list[Tensor], accumulate: bool) -> None:
    """Write (or add) the direction of a rule; GradDrop's step counter grows by 1."""
    name, arguments = rule
    for chunk in chunks(grads, out):
        values = chunk.values
        if name == "graddrop":
            direction = _graddrop(values, chunk.parts[0].coordinate, *arguments)
        else:
            direction = _trimmed_mean(values, *arguments)
        chunk.write(torch.where(values.isfinite().all(0), direction, torch.nan), accumulate)
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
    if is_watched():
        rows = list(values.sort(0).values.unbind())
    else:
        rows = list(values.unbind())
        for low, high in _exchanges(len(rows)):
            rows[low], rows[high] = torch.minimum(rows[low], rows[high]), torch.maximum(rows[low], rows[high])
    middle = rows[num_trimmed : len(rows) - num_trimmed]
    return _sum(middle) / len(middle)


@cached
def _exchanges(count: int) -> list[tuple[int, int]]:
    """Return the pairs of places to exchange, if out of order, to sort ``count`` values: Batcher's odd-even merges.

    Knuth, The Art of Computer Programming, volume 3, section 5.2.2, algorithm M. torch.sort takes some four times as
    long.
    """
    pairs = []
    top = 1 << max(count - 1, 1).bit_length() - 1
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            q, r, d = q >> 1, p, q - p
        p >>= 1
    return pairs


def _sum(rows: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the sum of the rows, added in ascending order in every column."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total
