# SPDX-License-Identifier: MIT
"""Eigenvalues in plain PyTorch, batched, and the methods that divide by them: IMTL-G, ConFIG, Aligned-MTL."""

from __future__ import annotations

import torch
from torch import Tensor

from .problems import all_done


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues [B, T] of positive semidefinite matrices, and their eigenvectors as rows [B, T, T]."""
    if matrix.device.type == "cpu":
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors.mT
    return jacobi(matrix)  # torch.linalg.eigh would synchronise


def jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :func:`eigh` does, in no order, by one-sided Jacobi rotations of disjoint pairs of rows at a time.

    Rotations that make the rows of a matrix A = V diag(lambda) V^T orthogonal turn it into diag(lambda) V^T.
    """
    num_tasks = matrix.shape[-1]
    players = num_tasks + num_tasks % 2
    rows = torch.nn.functional.pad(matrix, (0, 0, 0, players - num_tasks))
    rounds = max(players - 1, 1)
    pair = torch.arange(players // 2, device=matrix.device)
    for _ in range(15):
        rotated = torch.zeros((), dtype=torch.bool, device=matrix.device)
        for number in range(rounds):
            p, q = torch.where(pair == 0, rounds, (number + pair) % rounds), (number - pair) % rounds
            a, b = rows[:, p], rows[:, q]
            aa, bb, ab = a.square().sum(-1), b.square().sum(-1), (a * b).sum(-1)
            rotate = ab.abs() > 1e-15 * aa.sqrt() * bb.sqrt()
            rotated |= rotate.any()
            zeta = torch.where(rotate, (bb - aa) / (2 * ab), torch.inf)
            tangent = torch.where(zeta < 0, -1, 1) / (zeta.abs() + (1 + zeta.square()).sqrt())
            cosine = (1 + tangent.square()).rsqrt()[..., None]
            sine = cosine * tangent[..., None]
            rows[:, p], rows[:, q] = cosine * a - sine * b, sine * a + cosine * b
        if all_done(~rotated):
            break
    rows = rows[:, :num_tasks]  # the row that was added for an even number is still 0
    values = rows.norm(dim=-1)
    return values, torch.where(values[..., None] > 0, rows / values[..., None], 0)


def _solve_cosines(gram: Tensor, preference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return c = pinv(K) p for the matrix K of cosines, its length sqrt(c^T K c), and the norms."""
    num_tasks = gram.shape[-1]
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    product = norms[..., :, None] * norms[..., None, :]
    values, vectors = eigh(torch.where(product > 0, gram / product, 0))
    rounding = 2.0**-23 * num_tasks
    kept = values > rounding * values.max(-1, keepdim=True).values
    preference = torch.where(norms > 0, preference, 0)
    along = torch.where(kept, (vectors @ preference[..., None]).squeeze(-1), 0)
    enough = along.norm(dim=-1, keepdim=True) > rounding * preference.norm(dim=-1, keepdim=True)
    factor = torch.where(kept & enough, along / values, 0)
    c = (factor[..., None, :] @ vectors).squeeze(-2)
    return c, (factor * along).sum(-1, keepdim=True).sqrt(), norms


def imtl_g(gram: Tensor) -> Tensor:
    """Return the weights, of sum 1, that make the direction's products with all g_t / |g_t| equal."""
    c, _, norms = _solve_cosines(gram, gram.new_ones(gram.shape[-1]))
    v = torch.where(norms > 0, c / norms, 0)
    total = v.sum(-1, keepdim=True)
    return torch.where(total.abs() > 1e-12 * v.abs().sum(-1, keepdim=True), v / total, 0)


def config(gram: Tensor, preference: Tensor) -> Tensor:
    """Return ConFIG's weights: cosines of the direction in proportion to the preference."""
    c, length, norms = _solve_cosines(gram, preference)
    a = torch.where((norms > 0) & (length > 0), c / norms / length, 0)
    return (gram @ a[..., None]).squeeze(-1).sum(-1, keepdim=True) * a


def aligned_mtl(gram: Tensor, preference: Tensor, mode: str) -> Tensor:
    """Return the weights that make the preference's components along G's eigenvectors equally long."""
    num_tasks = gram.shape[-1]
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    values, vectors = eigh(torch.where(trace > 0, gram / trace, 0))
    kept = values > 2.0**-23 * num_tasks * values.max(-1, keepdim=True).values
    rank = kept.sum(-1, keepdim=True)
    ascending = torch.where(kept, values, torch.inf).sort(-1).values
    if mode == "min":
        scale = ascending[..., :1]
    elif mode == "median":  # the lower one
        scale = ascending.gather(-1, ((rank - 1) // 2).clamp(min=0))
    else:
        scale = torch.where(kept, values, 0).sum(-1, keepdim=True) / rank
    along = (vectors @ preference[..., None]).squeeze(-1)
    factor = torch.where(kept, (scale / values).sqrt() * along, 0)
    return torch.where(rank > 0, (factor[..., None, :] @ vectors).squeeze(-2), preference)
