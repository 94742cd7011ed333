# SPDX-License-Identifier: MIT
"""Priority-constrained descent: the first task's gradient, moved no further than the other tasks' progress demands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_fraction, describe
from .._constant import constant
from ..backends import choose
from ..backends.problems import is_finite
from ..functional import new_problems
from ._base import Method
from ._state import PerTask, state_on, taken_over

_ACCURACY = 1e-6  # of squares, as G has it
_RIDGE = 1e-12
_TINY = 1e-100  # stands for a zero that is divided by


class PCD(Method):
    """Priority-constrained descent (Varam & AlHajri, "Not All Objectives Are Born Equal", TMLR 2026, Algorithm 1).

    The first task is the primary one. With n_t = s_t g_t, s_t = 1 / sqrt(v_t) and v_t the average of |g_t|^2 over the
    steps, of decay beta and corrected for its start: d = |g_1| x / |x|, x = argmin |x - n_1|^2 such that n_t . x >=
    tau_t |n_t|^2 for all others. Each of these thus gets at least the share tau_t of the progress that a step along its
    own n_t would bring it.

    Conventions: the authors add 1e-8 to v_t, here nothing, so that scaling the gradients scales d. Where no x meets the
    constraints they are dropped, and d = g_1; g_1 = 0 and x = 0 give d = 0. In both questions a sum of vectors that is
    shorter than 1e-3 of their lengths' sum counts as 0, for G is accurate to the square of that. A step whose G is not
    finite does not enter the averages.
    Scale: as long as g_1. State: v and its correction. Cost: O(T^3).

    Args:
        tau: 0 <= tau <= 1, or one such number for each task but the first.
        beta: 0 <= beta < 1.
    """

    name = "pcd"
    state_by_problem = True
    scale = "as long as g_1"
    non_conflicting = "tau = 0"
    cost = "T^3"

    def __init__(self, tau: float | Sequence[float] | Tensor = 0.02, beta: float = 0.999) -> None:
        self.tau: float | PerTask
        if isinstance(tau, Sequence) or getattr(tau, "ndim", 0) > 0:
            wanted = "numbers >= 0 and <= 1"
            self.tau = PerTask("tau", tau, wanted, lambda each: (each >= 0) & (each <= 1))  # type: ignore[arg-type]
        else:
            self.tau = check_fraction("tau", tau)
        self.beta = check_fraction("beta", beta, one=False)
        self._averages: Tensor | None = None

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights [..., T], after the averages have taken in |g_t|^2."""
        problems, out = new_problems(gram)
        num_tasks = gram.shape[-1]
        shares = self._shares(gram.device, num_tasks)
        shape = torch.Size((*gram.shape[:-2], num_tasks + 1))
        averages = state_on(self.name, self._averages, shape, 0.0, gram.device)
        squares, finite = problems.diagonal(dim1=-2, dim2=-1), is_finite(problems)
        moved = averages.lerp(torch.nn.functional.pad(squares, (0, 1), value=1.0), 1 - self.beta)
        # |n_t|
        norms = torch.where(squares > 0, squares / moved[..., :-1] * moved[..., -1:], 0).sqrt()
        lengths = squares.clamp(min=0).sqrt()
        units = torch.where(lengths > 0, 1 / lengths, 0)
        cosines = problems * units[..., :, None] * units[..., None, :]
        combined = self._combine(cosines, shares * norms / norms[..., :1].clamp(min=_TINY), out, backend)
        squared = _square(cosines, combined)
        known = squared > _ACCURACY * combined.sum(-1, keepdim=True).square()
        weights = torch.where(known, lengths[..., :1] * units * combined / squared.sqrt(), 0)
        averages.copy_(torch.where(finite, moved, averages))
        self._averages = averages  # last: a step that raised has not begun
        return constant(f"{self.name} weights", torch.where(finite, weights, torch.nan), [gram])

    def _shares(self, device: torch.device, num_tasks: int) -> Tensor | float:
        if not isinstance(self.tau, PerTask):
            return self.tau
        given = len(self.tau.values)
        if given != num_tasks - 1:
            raise ValueError(f"tau must hold {num_tasks - 1} numbers, one for each task but the first, got {given}")
        return torch.nn.functional.pad(self.tau.on(device, given, self.name), (1, 0))

    def _combine(self, cosines: Tensor, demands: Tensor, out: Tensor, backend: str | None) -> Tensor:
        """Return the weights of x / |n_1| by unit vectors, for the least products that these must have with it.

        With z = x / |n_1| - u_1 the problem is the shortest z such that u_t . z >= h_t, which Lawson and Hanson (1974,
        chapter 23) solve by one of non-negative least squares: with e a unit vector at right angles to all u_t, and the
        v >= 0 for which sum_t v_t (u_t + h_t e) is nearest to e, z = sum_t v_t u_t / (1 - sum_t v_t h_t). That is
        DualProj's for the vectors u_t + h_t e and -e. No z meets the constraints where the distance is 0.
        """
        others = torch.arange(cosines.shape[-1], device=cosines.device) > 0
        needed = torch.where(others, demands - cosines[..., 0, :], 0)
        largest = needed.abs().amax(-1, keepdim=True).clamp(min=_TINY)
        heights = torch.where(others, needed / largest, -1)
        among_others = cosines * (others[:, None] & others)
        cone = among_others + heights[..., :, None] * heights[..., None, :]
        choose(backend, cone.device, cone.shape[-1]).weights(
            cone, "dualproj", (~others).double(), _RIDGE, math.inf, out
        )
        multipliers = torch.where(others, out, 0)
        met = _square(among_others, multipliers) > _ACCURACY * multipliers.sum(-1, keepdim=True).square()
        left = -(heights * out).sum(-1, keepdim=True)
        return torch.where(others, torch.where(met, multipliers * largest / left, 0), 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages [..., T + 1], of the squares and of ones; None before the first step."""
        return {"averages": None if self._averages is None else self._averages.clone()}

    def _restore(self, state: dict[str, Any]) -> None:
        averages = state["averages"]
        if averages is not None and (not isinstance(averages, Tensor) or averages.dim() == 0):
            raise ValueError(f"averages must be a tensor [..., T + 1], got {describe(averages)}")
        self._averages = None if averages is None else taken_over(self._averages, averages)


def _square(gram: Tensor, weights: Tensor) -> Tensor:
    """Return the squared length [..., 1] of weighted sums."""
    return (weights * (gram @ weights[..., None])[..., 0]).sum(-1, keepdim=True)
