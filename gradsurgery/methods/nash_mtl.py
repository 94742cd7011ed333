# SPDX-License-Identifier: MIT
"""Nash-MTL: the step as a bargain between the tasks."""

from __future__ import annotations

from .._checks import check_number
from ._solver import Solver, SolverMethod


class NashMTL(SolverMethod):
    """Nash bargaining (Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, equation 3).

    (G w)_t = 1 / w_t, w > 0: every task gains by d in proportion to the inverse of its weight. Then d is shortened to
    |d| <= max_norm.

    Conventions: solved to rounding at each step: w is the minimum of a convex function, found by Newton's method with a
    ridge of 1e-12 on the cosines. If rounding of G makes the function non-convex, the ridge is T 2^-23, then 8 times
    that and so on. (Other implementations iterate a few convex-concave steps from the last w.) Before d is shortened,
    |d|^2 is the number of gradients that are not zero, whatever their scale. |d| is measured by w^T G w, and may exceed
    max_norm by G's rounding where gradients nearly cancel: many times over where 16-bit gradients cancel to 1e-4 of
    their length. A zero gradient gets weight 0. If some gradients are Pareto-stationary by themselves, no solution
    exists; the ridge's solution is returned, in which these add about 0 to d, and nothing to |d|^2.
    Scale: |d| = min(max_norm, sqrt(T)); scaling all gradients does not change d. No state. Cost: O(T^3).

    Args:
        max_norm: > 0; infinity for no bound.
    """

    name = "nash_mtl"
    scale = "norm max_norm"
    non_conflicting = "if not Pareto-stationary"
    cost = "T^3"

    def __init__(self, max_norm: float = 1.0) -> None:
        self.max_norm = check_number("max_norm", max_norm)
        if not self.max_norm > 0:
            raise ValueError(f"max_norm must be > 0, got {max_norm}")

    def _solver(self, num_tasks: int) -> Solver:
        return Solver("fairgrad", 1.0, self.max_norm, depends_on_scale=True)
