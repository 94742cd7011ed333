# SPDX-License-Identifier: MIT
"""Priority-constrained descent: the first task's gradient, moved no further than the other tasks' progress demands."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_fraction
from .._constant import constant
from ..backends import choose
from ..backends.problems import is_finite
from ..functional import new_problems
from ._state import PerTask
from ._stateful import StatefulMethod


class PCD(StatefulMethod):
    """Priority-constrained descent (Varam & AlHajri, "Not All Objectives Are Born Equal", TMLR 2026, Algorithm 1).

    The first task is the primary one. With n_t = s_t g_t, s_t = 1 / sqrt(v_t) and v_t the bias-corrected moving average
    of |g_t|^2 over the steps, with decay beta: d = |g_1| x / |x|, x = argmin |x - n_1|^2 such that n_t . x >=
    tau_t |n_t|^2 for all other tasks. A step along x thus brings each of these at least the share tau_t of the progress
    that a step along its own n_t would bring; d is x rescaled to the length of g_1.

    Conventions: the authors add 1e-8 to v_t, here nothing is added, so that scaling the gradients scales d. If no x
    meets the constraints, they are dropped, and d = g_1. If g_1 = 0 or x = 0, d = 0. In deciding whether an x exists,
    and whether x = 0, a sum of vectors that is shorter than 1e-3 times the sum of their lengths counts as 0, because G
    of float32 gradients is accurate to the square of that. So if gradients of other tasks are opposite to within that
    accuracy, d may conflict with them even with tau = 0.
    A step whose G is not finite does not enter the averages.
    Scale: as long as g_1. State: v. Cost: O(T^3).

    Args:
        tau: 0 <= tau <= 1, or one such number for each task but the first.
        beta: 0 <= beta < 1.
    """

    name = "pcd"
    state_by_problem = True
    state_names = ("averages",)
    scale = "as long as g_1"
    non_conflicting = "if tau = 0, without opposites"
    linear = True
    cost = "T^3"

    def __init__(self, tau: float | Sequence[float] | Tensor = 0.02, beta: float = 0.999) -> None:
        self.tau: float | PerTask
        if isinstance(tau, Sequence) or getattr(tau, "ndim", 0) > 0:
            wanted = "- 1 numbers >= 0 and <= 1"
            self.tau = PerTask("tau", tau, wanted, lambda each: (each >= 0) & (each <= 1))  # type: ignore[arg-type]
        else:
            self.tau = check_fraction("tau", tau)
        self.beta = check_fraction("beta", beta, one=False)

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights [..., T], after the averages have taken in |g_t|^2."""
        problems, out = new_problems(gram)
        num_tasks = gram.shape[-1]
        shares = self._shares(gram.device, num_tasks)
        state = self._state_for(problems[..., 0])
        averages = state["averages"]
        squares, finite = problems.diagonal(dim1=-2, dim2=-1), is_finite(problems)
        # The bias correction, the same for all tasks, cancels.
        moved = averages.lerp(squares, 1 - self.beta)
        s = torch.where(moved > 0, moved.rsqrt(), 0)
        normalised = problems * s[..., :, None] * s[..., None, :]
        chosen = choose(backend, gram.device, num_tasks)
        chosen.weights(normalised, "pcd", shares, self.tau if isinstance(self.tau, float) else 0.0, math.inf, out)
        out *= torch.where(s[..., :1] > 0, s / s[..., :1], 0)
        averages.copy_(torch.where(finite, moved, averages))
        self._state = state  # last: a step that raises leaves no new state
        return constant(f"{self.name} weights", out, [gram])

    def _shares(self, device: torch.device, num_tasks: int) -> Tensor | None:
        self._check_fits(num_tasks)
        if not isinstance(self.tau, PerTask):
            return None
        return torch.nn.functional.pad(self.tau.on(device, num_tasks - 1, self.name), (1, 0))

    def _check_fits(self, num_tasks: int) -> None:
        if isinstance(self.tau, PerTask) and len(self.tau.values) != num_tasks - 1:
            given = len(self.tau.values)
            raise ValueError(f"tau must hold {num_tasks - 1} numbers, one for each task but the first, got {given}")

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        return {"averages": torch.zeros_like(like)}  # of |g_t|^2, without bias correction
