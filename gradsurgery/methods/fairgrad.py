# SPDX-License-Identifier: MIT
"""FairGrad: alpha-fair gains."""

from __future__ import annotations

from .._checks import check_positive
from ._solver import Solver, SolverMethod


class FairGrad(SolverMethod):
    """Fair resource allocation (Ban & Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, equation 8).

    (G w)_t = w_t^(-1 / alpha), w > 0: d maximises the alpha-fair utility of the tasks' gains. alpha = 1 is Nash-MTL
    without a bound on |d|; a large alpha favours the task that gains least.

    Conventions: as :class:`NashMTL`'s, except that gradients that are Pareto-stationary by themselves add about
    1e-12^(1 / (1 + alpha)) to d: 1e-6 for alpha = 1, but 0.1 for alpha = 10, and d may then conflict. With alpha >=
    50 and many dependent gradients, some problems stop after 400 steps, short of the solution. Gradients that are
    10^(300 alpha) times shorter than the longest one may get weight 0 by underflow: 1e30 times at alpha = 0.1, 1,000
    times at 0.01.
    Scale: a factor s on all gradients multiplies d by s^((1 - alpha) / (1 + alpha)). No state. Cost: O(T^3).

    Args:
        alpha: > 0.
    """

    name = "fairgrad"
    scale = "as the equation"
    non_conflicting = "if not Pareto-stationary"
    cost = "T^3"

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = check_positive("alpha", alpha)

    def _solver(self, num_tasks: int) -> Solver:
        return Solver("fairgrad", self.alpha, depends_on_scale=True)
