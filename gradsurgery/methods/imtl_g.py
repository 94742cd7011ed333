# SPDX-License-Identifier: MIT
"""IMTL-G: a direction with equal projections on all task gradients."""

from __future__ import annotations

from ._solver import Solver, SolverMethod


class IMTLG(SolverMethod):
    """The gradient part of impartial multi-task learning (Liu et al., ICLR 2021).

    d . g_t / |g_t| is the same for all t, and the weights sum to 1 (equation 4): with K_ij = G_ij / (|g_i| |g_j|) and
    c = pinv(K) 1, w_t = (c_t / |g_t|) / sum_k (c_k / |g_k|).

    Conventions: eigenvalues of K up to T 2^-23 times the largest one, which may be float32's rounding, count as 0. For
    dependent gradients the projections are equal in the sense of least squares, by the pseudo-inverse of K, which does
    not depend on the gradients' lengths (TorchJD takes the pseudo-inverse of G). Weights may be negative. If the
    projections are negative, d conflicts with every task; the same gradients at other lengths may give a d that
    conflicts with none. If sum_k (c_k / |g_k|) is 0 up to rounding, as for opposite gradients, all weights are 0. A
    zero gradient has weight 0.
    Scale: sums to 1. No state. Cost: O(T^3).
    """

    name = "imtl_g"
    scale = "sums to 1"
    cost = "T^3"

    def _solver(self, num_tasks: int) -> Solver:
        return Solver("imtl_g")
