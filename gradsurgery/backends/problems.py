# SPDX-License-Identifier: MIT
"""What the plain PyTorch solvers of batches of T x T problems share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def all_done(done: Tensor) -> bool:
    """Whether an iteration may end early. On a GPU it never does: to ask would synchronise."""
    return done.device.type == "cpu" and bool(done.all())


def equal_preference(gram: Tensor, solver: str) -> Tensor:
    """Return the preference [T] of a user who gives none: 1 / T each, for ConFIG 1 each."""
    num_tasks = gram.shape[-1]
    return gram.new_full((num_tasks,), 1 if solver == "config" else 1 / num_tasks)
