# SPDX-License-Identifier: MIT
"""Gradient Vaccine: projections towards the cosines that tasks usually have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_fraction
from .._constant import constant
from ..backends import choose
from ..functional import new_problems
from ._stateful import StatefulMethod, SteppedMethod


class GradVac(SteppedMethod, StatefulMethod):
    """Gradient Vaccine (Wang et al., ICLR 2021, Algorithm 1 and equations 3 to 5).

    For each task i the running vector p starts at g_i. It visits every j != i in a random order. If rho = cos(p, g_j)
    is below the target r = r_ij, p becomes p + g_j |p| (r sqrt(1 - rho^2) - rho sqrt(1 - r^2)) / (|g_j| sqrt(1 -
    r^2)), whose cosine with g_j is r. In any case r_ij then becomes (1 - beta) r_ij + beta rho. d = sum_i p_i. With
    targets of 0, as at first, this is PCGrad.

    Conventions: the orders are :func:`gradsurgery.task_order`'s; rho is that of the running vector; g_j is the original
    gradient; a visit with p = 0 or g_j = 0 is skipped; a target above 1 - 1e-8 counts as 1 - 1e-8. A step whose G is
    not finite leaves the targets as they were. Granularity "per_tensor" or "per_group" is the paper's version by layer.
    Scale: a sum over tasks. State: the targets [..., T, T], ``seed`` and the step counter. Cost: O(T^3).

    Args:
        beta: 0 <= beta <= 1, how far a target moves at each visit (the paper's 1e-2; LibMTL's is 0.5, and moves targets
            only where it changes p).
        seed: key of the visiting orders; the same on every rank. 0 <= seed < 2^63.
    """

    name = "gradvac"
    state_by_problem = True
    state_names = ("targets",)
    scale = "sum"
    linear = True
    cost = "T^3"

    def __init__(self, beta: float = 1e-2, seed: int = 0) -> None:
        super().__init__(seed)
        self.beta = check_fraction("beta", beta)

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights, move the targets, and advance the step counter."""
        problems, out = new_problems(gram)
        state = self._state_for(problems[..., 0])
        step, chosen = self._step_on(gram.device), choose(backend, gram.device, gram.shape[-1])
        order = torch.empty(gram.shape[-2:], dtype=torch.int64, device=gram.device)
        chosen.task_order(self.seed, step, order)
        chosen.gradvac(problems, order, self.beta, state["targets"], out)
        step += 1
        self._state = state  # last: a step that raises leaves no new state
        return constant(f"{self.name} weights", out, [gram])

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        return {"targets": like.new_zeros(*like.shape, like.shape[-1])}

    def state_dict(self) -> dict[str, Any]:
        """Return the targets (None before the first step), the seed and the step counter."""
        return StatefulMethod.state_dict(self) | SteppedMethod.state_dict(self)

    def _restore(self, state: dict[str, Any]) -> None:
        targets = self._checked(state)
        SteppedMethod._restore(self, state)
        self._take_over(targets)

    def _shape_of(self, first: Tensor) -> torch.Size:
        return first.shape[:-1]
