# SPDX-License-Identifier: MIT
"""CAGrad: the best direction for the worst task, near the mean gradient."""

from __future__ import annotations

from .._checks import check_choice, check_not_negative
from ._solver import Solver, SolverMethod


class CAGrad(SolverMethod):
    """Conflict-averse gradient descent (Liu et al., NeurIPS 2021, Algorithm 1).

    d = argmax over |d - g_0| <= c |g_0| of min_t g_t . d, with g_0 the mean gradient. By duality d = g_0 + c |g_0| g_x
    / |g_x|, where g_x = sum_t x_t g_t minimises g_x . g_0 + c |g_0| |g_x| over the simplex; w_t = 1 / T + x_t c |g_0|
    / |g_x|. The solution is exact, without an epsilon, as long as |g_x| is above 1e-7 sqrt(sum_t |g_t|^2). Below that
    the gradients count as Pareto-stationary, so a task whose gradient is only a few 1e-8 times as long as the longest
    is not protected. G of 16-bit gradients, and of float32 gradients of five or more tasks, is rounded too much for
    that: with c > 1, d may leave the ball if |g_x| is below 1e-3 times the longest gradient, and may be many times too
    far out if it is below 1e-4 times.

    Conventions: if g_x = 0 (the gradients are Pareto-stationary in the ball), several directions solve the problem. The
    one nearest to g_0 is taken, and brought back to the ball if rounding of G leads out of it. (TorchJD returns zeros,
    also for any gradients with sum |g_t|^2 < 1e-4.) With c >= 1, d conflicts with no task, with two exceptions: for
    Pareto-stationary gradients it may conflict with those shorter than 1e-2 times the longest one, and a d of almost 0
    is determined by rounding. c = 0 gives the mean.
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
