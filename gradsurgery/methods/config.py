# SPDX-License-Identifier: MIT
"""ConFIG: a direction with the same angle to all task gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._solver import Solver, SolverMethod
from ._state import PerTask


class ConFIG(SolverMethod):
    """Conflict-free inverse gradients (Liu, Chu & Thuerey, ICLR 2025, equations 2 and 3).

    d = (sum_t g_t . u) u with the unit vector u in the direction of pinv(U) p, U the unit task gradients as rows: the
    cosines of u with the task gradients are in proportion to p. In Gram form, with K = U U^T: c = pinv(K) p,
    a_t = c_t / (|g_t| sqrt(c^T K c)), w = (1^T G a) a.

    Conventions: eigenvalues of K up to T 2^-23 times the largest one, which may be float32's rounding, count as 0, also
    for float64 gradients. If p has no part along the eigenvectors of the others, as for opposite gradients, w = 0. A
    zero gradient is left out.
    Scale: a sum over tasks; d conflicts with no task if p > 0 and the gradients are independent, by more than that:
    unit gradients whose combination is some 1e-3 long count as dependent. No state. Cost: O(T^3).

    Args:
        pref: p, T finite numbers; None: 1 each.
    """

    name = "config"
    scale = "sum"
    non_conflicting = "if independent"
    linear = True
    cost = "T^3"

    def __init__(self, pref: Sequence[float] | Tensor | None = None) -> None:
        self.pref = None if pref is None else PerTask("pref", pref)

    def _solver(self, num_tasks: int) -> Solver:
        return Solver("config", pref=self.pref)
