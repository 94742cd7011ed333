# SPDX-License-Identifier: MIT
"""Aligned-MTL: task gradients made orthogonal and equally long."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._checks import check_choice
from ._solver import Solver, SolverMethod
from ._state import PerTask


class AlignedMTL(SolverMethod):
    """Independent component alignment (Senushkin et al., CVPR 2023, Algorithm 1).

    With G = V diag(lambda) V^T: w = sqrt(s) V diag(lambda)^(-1/2) V^T p. The principal components of the task gradients
    are all given one length, sqrt(s), where s is the least, the median or the mean eigenvalue.

    Conventions: eigenvalues up to T 2^-23 times the largest one, which may be float32's rounding, are left out, also of
    s; the median of an even number is the lower one. If all gradients are zero, w = p. (LibMTL has p = 1.)
    Scale: a mean over tasks. No state. Cost: O(T^3).

    Args:
        pref: p, T finite numbers; None: 1 / T each.
        scale_mode: "min", "median" or "rmse" (the mean eigenvalue).
    """

    name = "aligned_mtl"
    scale = "mean"
    cost = "T^3"

    def __init__(self, pref: Sequence[float] | Tensor | None = None, scale_mode: str = "min") -> None:
        self.pref = None if pref is None else PerTask("pref", pref)
        self.scale_mode = check_choice("scale_mode", scale_mode, ("min", "median", "rmse"))

    def _solver(self, num_tasks: int) -> Solver:
        return Solver(f"aligned_mtl_{self.scale_mode}", pref=self.pref)
