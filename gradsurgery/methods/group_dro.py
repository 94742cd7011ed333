# SPDX-License-Identifier: MIT
"""Group DRO: exponentiated-gradient weights on the worst losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_not_negative
from ._losses import LossMethod


class GroupDRO(LossMethod):
    """Distributionally robust optimisation over tasks (Sagawa et al., ICLR 2020, Algorithm 1).

    The problem is min over the model of max over q in the simplex of sum_t q_t L_t. Each step takes q_t <- q_t exp(eta
    L_t) / sum_s q_s exp(eta L_s), then w = q. As in the algorithm, and in the authors' code, the step uses the q that
    its own losses have updated.

    Conventions: every task takes part in every step; no adjustment for group sizes. eta has the unit of 1 / loss.
    Losses of any sign.
    Scale: sums to 1. State: log q [..., T], -log T at the start. Computed in logarithms.

    Args:
        eta: step on q, >= 0 (0.01 as in the authors' code).
    """

    name = "group_dro"
    scale = "sums to 1"
    state_names = ("log_q",)

    def __init__(self, eta: float = 0.01) -> None:
        self.eta = check_not_negative("eta", eta)

    def _initial(self, losses: Tensor) -> dict[str, Tensor]:
        return {"log_q": torch.full_like(losses, -math.log(losses.shape[-1]))}

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        log_q = (self._state_for(losses)["log_q"] + self.eta * losses).log_softmax(-1)
        self._keep(counts, log_q=log_q)
        return log_q.exp()
