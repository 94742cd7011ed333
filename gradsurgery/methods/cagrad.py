# SPDX-License-Identifier: MIT
"""CAGrad: the best direction for the worst task, near the mean gradient."""

from __future__ import annotations

from .._checks import check_choice, check_not_negative
from ._solver import Solver, SolverMethod


class CAGrad(SolverMethod):
    """Conflict-averse gradient descent (Liu et al., NeurIPS 2021, Algorithm 1).

    d = argmax over |d - g_0| <= c |g_0| of min_t g_t . d, with g_0 the mean gradient. By duality d = g_0 + c |g_0| g_x
    / |g_x|, where g_x = sum_t x_t g_t minimises g_x . g_0 + c |g_0| |g_x| over the simplex; w_t = 1 / T + x_t c |g_0|
    / |g_x|. The solution is exact, without an epsilon, as long as |g_x| is above 1e-7 of sqrt(sum_t |g_t|^2): below,
    the gradients count as Pareto-stationary, so that tasks a few 1e-8 as long as the longest are not protected. G of
    16-bit gradients, and of those in float32 of five tasks and more, is rounded too much for that: where |g_x| is below
    1e-3 of the longest, d may leave the ball with c > 1, many times over below 1e-4.

    Conventions: where the gradients are Pareto-stationary in the ball, g_x = 0, several directions solve the problem,
    and the one nearest to g_0 is taken, shortened to the ball where rounding of G leads out of it (TorchJD returns
    zeros, also for any gradients of sum |g_t|^2 < 1e-4). With c >= 1 d conflicts with no task, with two exceptions:
    for Pareto-stationary gradients it may conflict with those below 1e-2 of the longest one's length, and a d of
    almost 0 is a matter of rounding. c = 0 is the mean.
    Scale: 1 + c times a mean over tasks, times the factor of ``rescale``. No state. Cost: O(T^3).

    Args:
        c: radius of the ball, 0 <= c <= 1e30, relative to |g_0|.
        rescale: 0: d as above, the paper's; 1: d / (1 + c^2), as in the authors' code; 2: d / (1 + c).
    """

    name = "cagrad"
    scale = "mean, times 1 + c"
    non_conflicting = "if c >= 1"
    cost = "T^3"

    def __init__(self, c: float = 0.5, rescale: int = 0) -> None:
        self.c = check_not_negative("c", c)
        if self.c > 1e30:
            raise ValueError(f"c must be at most 1e30, got {c}")
        self.rescale = check_choice("rescale", rescale, (0, 1, 2))

    def _solver(self, num_tasks: int) -> Solver:
        if self.rescale == 0:
            return Solver("cagrad", self.c)
        return Solver("cagrad", self.c, divisor=1 + (self.c**2 if self.rescale == 1 else self.c))
