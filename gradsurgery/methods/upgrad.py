# SPDX-License-Identifier: MIT
"""UPGrad: each gradient moved no further than to where it conflicts with none, then averaged."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._checks import check_positive
from ._solver import Solver, SolverMethod
from ._state import PerTask


class UPGrad(SolverMethod):
    """Unconflicting projection of gradients (Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization", 2024).

    d = sum_t P(p_t g_t), P the projection on the cone of the directions that conflict with no task gradient: w = sum_t
    argmin {v^T H v : v >= p_t e_t} with H = G / trace(G) + reg_eps I.

    Conventions: the ridge makes P unique and its problem well conditioned; it is relative to G, so that scaling the
    gradients scales d (TorchJD takes the mean instead where trace(G) < 1e-4). It is one ridge for all tasks: those with
    |g_t|^2 not far above reg_eps trace(G), and short gradients nearly opposite to a long one, are not protected from
    conflicts. With |g_2| = 0.1 |g_1| and 172 degrees between them, cos(d, g_2) is -0.05 (:class:`DualProj`: -0.07),
    with reg_eps = 1e-8 above -1e-5. For T = 2 and p = 1 this is PCGrad, apart from the ridge.
    Scale: a mean over tasks. No state. Cost: O(T^4).

    Args:
        pref: p, T finite numbers; negative ones count as 0; None: 1 / T each.
        reg_eps: the ridge, > 0.
    """

    name = "upgrad"
    scale = "mean"
    non_conflicting = "up to reg_eps"
    linear = "up to reg_eps"
    cost = "T^4"

    def __init__(self, pref: Sequence[float] | Tensor | None = None, reg_eps: float = 1e-4) -> None:
        self.pref = None if pref is None else PerTask("pref", pref)
        self.reg_eps = check_positive("reg_eps", reg_eps)

    def _solver(self, num_tasks: int) -> Solver:
        return Solver("upgrad", self.reg_eps, pref=self.pref)
