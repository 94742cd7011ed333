# SPDX-License-Identifier: MIT
"""FairGrad: alpha-fair gains."""

from __future__ import annotations

from .._checks import check_positive
from ._base import Solver, SolverMethod


class FairGrad(SolverMethod):
    """Fair resource allocation (Ban & Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, equation 8).

    (G w)_t = w_t^(-1 / alpha), w > 0: d maximises the alpha-fair utility of the tasks' gains. alpha = 1 is Nash-MTL
    without a bound on |d|; a large alpha favours the task that gains least.

    Conventions: as :class:`NashMTL`'s, but where gradients are Pareto-stationary and no solution exists, the ridge's d
    has the order of 1e-12^(1 / (1 + alpha)): 1e-6 for alpha = 1, but 0.1 for 10, where it may conflict. Some problems
    of alpha >= 50, of many dependent gradients, end short of the solution, after 400 steps. The weights of gradients
    that are shorter than the longest one by 10^(300 alpha) may underflow to 0: by 1e30 at alpha = 0.1, by 1,000 at
    0.01.
    Scale: factors s on all gradients multiply d by s^((1 - alpha) / (1 + alpha)). No state. Cost: O(T^3).

    Args:
        alpha: > 0.
    """

    name = "fairgrad"
    scale = "as the equation"
    non_conflicting = "where not stationary"
    cost = "T^3"

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = check_positive("alpha", alpha)

    def _solver(self, num_tasks: int) -> Solver:
        return Solver("fairgrad", self.alpha, depends_on_scale=True)
