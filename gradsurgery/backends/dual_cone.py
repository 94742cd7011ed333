# SPDX-License-Identifier: MIT
"""Projections on the cone of directions that conflict with no task, in plain PyTorch, batched: UPGrad and DualProj."""

from __future__ import annotations

import torch
from torch import Tensor

from .problems import all_done, solve

_PATIENCE = 4
_ROUNDING = 1e-13


def dual_cone(gram: Tensor, u: Tensor, ridge: float) -> Tensor:
    """Return argmin v^T H v with v >= u, H = G / trace(G) + ridge I, for each of several u [P, T]: [B, P, T].

    With z = v - u and y = H v the conditions are z >= 0, y >= 0, z^T y = 0: the tasks of a set F have y = 0, the others
    z = 0. Block principal pivoting (Judice & Pires 1994) lets all tasks whose y or z comes out negative change sides at
    once, as long as that makes them fewer. Else Lawson & Hanson's method (1974) starts anew, which lowers v^T H v at
    each step: the task with the most negative y joins F; on the way to the minimum over F, tasks whose z would become
    negative leave F. If H turns out to be singular or indefinite, which rounding of G can cause, all begins again with
    a larger ridge.
    """
    num_tasks = gram.shape[-1]
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    scaled = torch.where(trace > 0, gram / trace, 0)[:, None]
    eye = torch.eye(num_tasks, dtype=gram.dtype, device=gram.device)
    u = u.expand(len(gram), *u.shape)
    v, best, free = u, u, torch.zeros_like(u, dtype=torch.bool)
    one = torch.ones_like(u[..., :1])
    ridges, shortest, fewest, patience = ridge * one, torch.inf * one, (num_tasks + 1) * one, _PATIENCE * one
    pivoting = at_minimum = one > 0
    settled = ~pivoting
    for _ in range(4 * num_tasks + 64):
        h = scaled + ridges[..., None] * eye
        root = h.diagonal(dim1=-2, dim2=-1).sqrt()
        y = (h @ v[..., None]).squeeze(-1)
        squared = (v * y).sum(-1, keepdim=True)
        length = squared.clamp(min=0).sqrt()
        indefinite = ~settled & ~(squared >= -_ROUNDING * (v * root).square().sum(-1, keepdim=True))

        # Below 0 by more than rounding: |y_i| is at most |H^(1/2) v| H_ii^(1/2).
        wrong = torch.where(free, (v - u) * root < -10 * _ROUNDING * length, y < -_ROUNDING * length * root)
        count = wrong.sum(-1, keepdim=True)
        solved = pivoting & (count == 0)
        patience = torch.where(count < fewest, _PATIENCE, patience - 1)
        fewest = torch.minimum(fewest, count)
        gives_up = pivoting & ~solved & (patience == 0)

        lowest = ~pivoting & at_minimum & ~settled
        descends = lowest & (length < shortest)
        best, shortest = torch.where(solved | descends, v, best), torch.where(descends, length, shortest)
        least, joining = torch.where(free, torch.inf, y / root).min(-1, keepdim=True)
        joins = descends & (least < -_ROUNDING * length)
        settled = settled | (~indefinite & (solved | (lowest & ~joins)))
        if all_done(settled):
            break

        starts = indefinite | gives_up
        pivoting = torch.where(indefinite, True, pivoting & ~gives_up)
        ridges = torch.where(indefinite, (8 * ridges).clamp(min=2.0**-33), ridges)
        shortest, fewest = torch.where(starts, torch.inf, shortest), torch.where(starts, num_tasks + 1, fewest)
        patience = torch.where(starts, _PATIENCE, patience)
        free = free ^ (wrong & pivoting) | torch.zeros_like(free).scatter(-1, joining, joins)
        free = free & ~starts
        pair = free[..., :, None] & free[..., None, :]
        matrix = torch.where(pair, h, torch.where(free, 0, 1)[..., None] * eye)
        right = torch.where(free, -(h @ torch.where(free, 0, u)[..., None]).squeeze(-1), u)
        target = solve(matrix, right)
        blocked = free & (target < u) & ~pivoting
        reach, leaving = torch.where(blocked, (v - u) / (v - target), torch.inf).min(-1, keepdim=True)
        leaves = blocked & torch.zeros_like(free).scatter(-1, leaving, blocked.any(-1, keepdim=True))
        moved = torch.where(pivoting | starts, target, v + reach.clamp(max=1) * (target - v))
        v = torch.where(settled, v, torch.where(leaves, u, moved))
        free, at_minimum = free & ~leaves, ~leaves.any(-1, keepdim=True)
    return torch.maximum(best, u)
