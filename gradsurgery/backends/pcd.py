# SPDX-License-Identifier: MIT
"""Priority-constrained descent in plain PyTorch, batched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .problems import squared_length

_ACCURACY = 1e-6
"""The relative accuracy of G, and so of squared lengths."""
_RIDGE = 1e-12


def pcd(gram: Tensor, shares: Tensor | float, project: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    """Return the weights [B, T] of |g_1| x / |x|, x = argmin |x - g_1|^2 with g_t . x >= shares_t |g_t|^2 for t > 1.

    With u_t = g_t / |g_t|, z = x / |g_1| - u_1 is the shortest z such that u_t . z >= h_t = shares_t |g_t| / |g_1| -
    u_t . u_1. Lawson & Hanson (1974, chapter 23) turn this into a non-negative least squares problem: let e be a unit
    vector at right angles to all u_t, and v >= 0 such that sum_t v_t (u_t + h_t e) is nearest to e; then z =
    sum_t v_t u_t / (1 - sum_t v_t h_t). That is DualProj's problem for these vectors, with -e in the first one's place;
    h is divided by its largest magnitude. If the distance is 0, no z meets the constraints, and z = 0 is taken.

    Args:
        gram: [B, T, T], finite.
        shares: [T], or one number.
        project: :func:`dual_cone`, or a function that does the same.
    """
    others = torch.arange(gram.shape[-1], device=gram.device) > 0
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    units = torch.where(norms > 0, 1 / norms, 0)
    cosines = gram * units[..., :, None] * units[..., None, :]
    needed = torch.where(others, shares * norms * units[..., :1] - cosines[..., 0, :], 0)
    largest = needed.abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    heights = torch.where(others, needed / largest, -1)
    among_others = cosines * (others[:, None] & others)
    cone = among_others + heights[..., :, None] * heights[..., None, :]
    v = project(cone, (~others).to(gram.dtype)[None], _RIDGE).squeeze(-2)
    left = -(heights * v).sum(-1, keepdim=True)
    v = torch.where(others, v, 0)
    met = squared_length(among_others, v) > _ACCURACY * v.sum(-1, keepdim=True).square()
    combined = torch.where(others, torch.where(met, v * largest / left, 0), 1)
    squared = squared_length(cosines, combined)
    known = (norms[..., :1] > 0) & (squared > _ACCURACY * combined.sum(-1, keepdim=True).square())
    return torch.where(known, norms[..., :1] * units * combined / squared.sqrt(), 0)
