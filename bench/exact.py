# SPDX-License-Identifier: MIT
"""Gram matrices and errors in float64, by blocks of columns, for gradients [T, N] on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

COLUMNS = 128
"""Columns of one product: many short products use more of a GPU than one long product."""


def exact_gram(gradients: Tensor) -> Tensor:
    """Return J J^T, with float64 products and sums."""
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=gradients.device)
    for block in _widened(gradients):
        rest = block.shape[1] % COLUMNS
        parts = block[:, rest:].unflatten(1, (-1, COLUMNS)).movedim(1, 0)
        products += (parts @ parts.mT).sum(0) + block[:, :rest] @ block[:, :rest].mT
    return products


def gram_error(exact: Tensor, products: Tensor) -> float:
    """Return the largest |G_ij - exact| / (|g_i| |g_j|)."""
    norms = exact.diagonal().sqrt()
    return ((products - exact).abs() / norms / norms[:, None]).max().item()


def direction_error(gradients: Tensor, weights: Tensor, direction: Tensor | list[Tensor]) -> float:
    """Return |d - d_exact| / |d_exact| with the float64 direction of these weights."""
    if not isinstance(direction, Tensor):
        direction = torch.cat(direction)
    weights = weights.double()
    squares = torch.zeros(2, dtype=torch.float64, device=gradients.device)
    begin = 0
    for block in _widened(gradients):
        exact = weights @ block
        off = direction[begin : begin + block.shape[1]] - exact
        squares += torch.stack([off.square().sum(), exact.square().sum()])
        begin += block.shape[1]
    return (squares[0] / squares[1]).sqrt().item()


def _widened(gradients: Tensor) -> Iterator[Tensor]:
    """Yield float64 blocks of columns, at most half a gigabyte each."""
    width = max(1, (1 << 26) // len(gradients) // COLUMNS) * COLUMNS
    return (block.double() for block in gradients.split(width, dim=1))
