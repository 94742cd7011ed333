# SPDX-License-Identifier: MIT
"""DualProj: the mean gradient moved no further than to where it conflicts with no task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._checks import check_positive
from ._solver import Solver, SolverMethod
from ._state import PerTask


class DualProj(SolverMethod):
    """The projection of sum_t p_t g_t on the cone of the directions that conflict with no task gradient.

    w = argmin {v^T H v : v >= p} with H = G / trace(G) + reg_eps I: the problem of gradient episodic memory
    (Lopez-Paz & Ranzato, NeurIPS 2017, equation 11), with all tasks at once.

    Conventions: as :class:`UPGrad`'s.
    Scale: a mean over tasks. No state. Cost: O(T^3).

    Args:
        pref: p, T finite numbers; None: 1 / T each.
        reg_eps: the ridge, > 0.
    """

    name = "dualproj"
    scale = "mean"
    non_conflicting = "up to reg_eps"
    cost = "T^3"

    def __init__(self, pref: Sequence[float] | Tensor | None = None, reg_eps: float = 1e-4) -> None:
        self.pref = None if pref is None else PerTask("pref", pref)
        self.reg_eps = check_positive("reg_eps", reg_eps)

    def _solver(self, num_tasks: int) -> Solver:
        return Solver("dualproj", self.reg_eps, pref=self.pref)
