# SPDX-License-Identifier: MIT
"""What the plain PyTorch solvers of batches of T x T problems share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._compiling import capturing, is_watched

# PyTorch factors a batch of matrices in several threads at once, and MKL's results are wrong then from 151 rows on, if
# it returns at all (https://github.com/pytorch/pytorch/issues/142815).
_MOST_BATCHED = 128


def is_finite(gram: Tensor) -> Tensor:
    """Return whether each G [..., T, T] is finite, bool [..., 1]."""
    return are_finite(gram.flatten(-2))


def are_finite(values: Tensor) -> Tensor:
    """Return whether all of each [..., T] are finite, bool [..., 1]."""
    # Two operations, where isfinite() alone takes four.
    largest: Tensor = torch.linalg.vector_norm(values, math.inf, -1, keepdim=True)
    return largest < math.inf


def squared_length(gram: Tensor, x: Tensor) -> Tensor:
    """Return the squared length x^T G x >= 0 of weighted sums, [..., 1]."""
    return (x * (gram @ x[..., None]).squeeze(-1)).sum(-1, keepdim=True).clamp(min=0)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return x [..., T] with A x = b for each A [..., T, T] and b [..., T]; where A is singular, anything."""
    solution: Tensor
    if matrix.device.type == "cpu" and matrix.shape[-1] > _MOST_BATCHED:
        solution = right.new_empty(right.shape)
        for x, a, b in zip(solution.flatten(0, -2), matrix.flatten(0, -3), right.flatten(0, -2), strict=True):
            x.copy_(torch.linalg.solve_ex(a, b)[0])
    else:
        solution = torch.linalg.solve_ex(matrix, right[..., None])[0].squeeze(-1)
    return solution


def at_hand(gram: Tensor) -> Tensor:
    """Return G for an iteration: on the host, but where it is while a CUDA graph is captured or functions are watched.

    An iteration on a GPU cannot end early, and takes thousands of launches (for CAGrad of 8 tasks 360,000), which is
    far longer than to wait for G.
    """
    stays = gram.device.type in ("cpu", "meta") or is_watched() or capturing(gram.device)
    return gram if stays else gram.cpu()


def all_done(done: Tensor) -> bool:
    """Whether an iteration may end early. On a GPU it never does: to ask would synchronise."""
    return done.device.type == "cpu" and bool(done.all())


def equal_preference(gram: Tensor, solver: str) -> Tensor:
    """Return the preference [T] of a user who gives none: 1 / T each, for ConFIG 1 each."""
    num_tasks = gram.shape[-1]
    return gram.new_full((num_tasks,), 1 if solver == "config" else 1 / num_tasks)
