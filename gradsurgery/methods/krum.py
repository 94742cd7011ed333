# SPDX-License-Identifier: MIT
"""Krum: the gradients that are closest to the others."""

from __future__ import annotations

from .._checks import check_count
from ._solver import Solver, SolverMethod


class Krum(SolverMethod):
    """The mean of the m gradients that are closest to the others (Blanchard et al., NeurIPS 2017).

    score_i = sum of |g_i - g_j|^2 = G_ii + G_jj - 2 G_ij over the T - f - 2 nearest j != i; w_i = 1 / m for the m tasks
    of least score, else 0. m = 1 is Krum, m > 1 multi-Krum.

    Conventions: squared distances, as in the paper (TorchJD sums plain ones); of tasks with equal scores the first is
    taken; for T <= 2 there are no nearest others, and all scores are 0.
    Scale: sums to 1. No state. Cost: O(T^3).

    Args:
        num_byzantine: f >= 0, how many gradients may be arbitrary; T must be at least f + 3 if f > 0.
        num_selected: m >= 1, at most T.
    """

    name = "krum"
    scale = "sums to 1"
    cost = "T^3"

    def __init__(self, num_byzantine: int = 0, num_selected: int = 1) -> None:
        self.num_byzantine = check_count("num_byzantine", num_byzantine, least=0)
        self.num_selected = check_count("num_selected", num_selected)

    def _solver(self, num_tasks: int) -> Solver:
        needed = max(self.num_selected, self.num_byzantine + 3 if self.num_byzantine else 1)
        if num_tasks < needed:
            raise ValueError(
                f"Krum with num_byzantine={self.num_byzantine} and num_selected={self.num_selected} needs at least "
                f"{needed} tasks, got {num_tasks}"
            )
        return Solver("krum", float(self.num_byzantine), float(self.num_selected))
