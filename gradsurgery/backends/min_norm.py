# SPDX-License-Identifier: MIT
"""The shortest convex combination, in plain PyTorch, batched: Wolfe's method and Frank & Wolfe's."""

from __future__ import annotations

import torch
from torch import Tensor

from .problems import all_done, solve


def frank_wolfe(gram: Tensor, max_iter: int, tol: float) -> Tensor:
    """Sener & Koltun 2018, Algorithm 2: move towards the vertex t of least (G w)_t by an exact line search."""
    weights = torch.full(gram.shape[:-1], 1 / gram.shape[-1], dtype=gram.dtype, device=gram.device)
    running = torch.ones(len(gram), 1, dtype=torch.bool, device=gram.device)
    for _ in range(max_iter):
        gw = (gram @ weights[..., None]).squeeze(-1)
        vertex = gw.argmin(-1, keepdim=True)
        ww = (weights * gw).sum(-1, keepdim=True)
        wt = gw.gather(-1, vertex)
        tt = gram.diagonal(dim1=-2, dim2=-1).gather(-1, vertex)
        keep = torch.where(wt >= ww, 1, torch.where(wt >= tt, 0, (tt - wt) / (ww + tt - 2 * wt)))
        moved = (weights * keep).scatter_add(-1, vertex, 1 - keep)
        weights = torch.where(running, moved, weights)
        running = running & (1 - keep >= tol)
        if all_done(~running):
            break
    return weights


def wolfe(gram: Tensor, start: Tensor | None = None) -> Tensor:
    """Wolfe 1976 in Gram form, on a batch: one affine minimisation on the active set per iteration.

    The shortest point of the affine hull of a set S solves (G_S + c 1 1^T) u = 1, w = u / sum(u), for any c > 0. If
    it lies in the simplex, the task that most violates (G w)_j >= w^T G w joins S; else w moves to the boundary and
    a task leaves. S is that of ``start``, weights of a problem nearby, or the shortest gradient alone.
    """
    num_tasks = gram.shape[-1]
    squared_norms = gram.diagonal(dim1=-2, dim2=-1)
    norms = squared_norms.sqrt()
    shift, shortest = squared_norms.min(-1, keepdim=True)
    alone = torch.zeros_like(squared_norms).scatter(-1, shortest, 1)
    settled = ~(shift > 0)  # a zero gradient is the shortest point itself
    weights = alone if start is None else torch.where(settled, alone, start)
    best, least = weights, torch.full_like(shift, torch.inf)
    lowest, stalls = least, torch.zeros_like(shortest)
    active = weights > 0
    at_minimum = torch.full_like(settled, start is None)
    eye = torch.eye(num_tasks, dtype=gram.dtype, device=gram.device)
    for _ in range(8 * num_tasks + 32):
        gw = (gram @ weights[..., None]).squeeze(-1)
        value = (weights * gw).sum(-1, keepdim=True)
        violation = (value - gw) / norms / (weights * norms).sum(-1, keepdim=True)
        worst, joining = torch.where(active, -torch.inf, violation).max(-1, keepdim=True)
        missing = torch.where(active, violation.abs(), violation).amax(-1, keepdim=True)
        better = at_minimum & ~settled & (missing <= least)
        best, least = torch.where(better, weights, best), torch.where(better, missing, least)
        # Where rounding no longer lets w^T G w descend, sets would cycle.
        stalls = torch.where(at_minimum, torch.where(value < lowest, 0, stalls + 1), stalls)
        lowest = torch.where(at_minimum, torch.minimum(value, lowest), lowest)
        settled = settled | (at_minimum & ((worst <= 1e-14) | (stalls == 8 + num_tasks // 8)))
        if all_done(settled):
            break
        joins = torch.zeros_like(active).scatter(-1, joining, at_minimum & ~settled)
        active = active | joins

        pair = active[..., :, None] & active[..., None, :]
        # The 1e-15 keeps the matrix regular when S is dependent to working precision.
        matrix = (
            torch.where(pair, gram + shift[..., None], 0)
            + torch.where(active, 1e-15 * squared_norms, 1)[..., None] * eye
        )
        u = solve(matrix, active.to(gram.dtype))
        target = torch.where(active, u / u.sum(-1, keepdim=True), 0)
        settled = settled | ~target.isfinite().all(-1, keepdim=True)  # w is the best there is
        blocked = active & (target <= 0)
        distance = torch.where(blocked, weights / (weights - target), torch.inf)
        distance = torch.where(blocked & (weights == target), 0, distance)
        reach, leaving = distance.min(-1, keepdim=True)
        leaves = blocked & torch.zeros_like(active).scatter(-1, leaving, blocked.any(-1, keepdim=True))
        moved = weights + reach.clamp(max=1) * (target - weights)
        weights = torch.where(settled, weights, torch.where(leaves, 0, moved))
        active = active & (settled | ~leaves)
        at_minimum = ~leaves.any(-1, keepdim=True)
    return best
