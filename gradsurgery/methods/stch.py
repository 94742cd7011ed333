# SPDX-License-Identifier: MIT
"""STCH: a smooth maximum of the losses' logarithms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_count, check_positive
from ._losses import LossMethod


class STCH(LossMethod):
    """Smooth Tchebycheff scalarisation of logarithms (Lin et al., ICML 2024, in the form of LibMTL).

    f = T mu log sum_t exp(l_t / mu), l_t = log(L_t / n_t), n the nadir: w_t = df / dL_t = T softmax(l / mu)_t / L_t. In
    the first ``warmup`` steps f = sum_t log L_t and w_t = 1 / L_t; n is the mean of the losses over the last fifth of
    these steps, at least one. Multiplying a loss by a factor from the start leaves the direction as it is.

    Conventions: the warm-up counts steps, where LibMTL counts epochs, of which four pass and the fifth gives the nadir:
    for the same schedule, set ``warmup`` to the number of steps in five epochs. No epsilon in the logarithms (LibMTL:
    1e-20). Losses must not be negative (NaN weights). A loss of 0 is left out of the sum: weight 0; l_t = 0 where n_t
    is 0.
    Scale: sum_t w_t L_t = T. State: the nadir [..., T], as far as it has been summed, and the number of steps.

    Args:
        mu: smoothness, > 0; the smaller, the nearer to the maximum.
        warmup: steps on the sum of logarithms, >= 1; a run resumed from a checkpoint must use the same number.
    """

    name = "stch"
    scale = "w . L = T"
    takes_logarithms = True
    state_names = ("nadir", "steps")

    def __init__(self, mu: float = 1.0, warmup: int = 100) -> None:
        self.mu = check_positive("mu", mu)
        self.warmup = check_count("warmup", warmup)

    def _initial(self, losses: Tensor) -> dict[str, Tensor]:
        return {"nadir": torch.zeros_like(losses), "steps": torch.zeros_like(losses[..., :1], dtype=torch.int64)}

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        state = self._state_for(losses)
        nadir, steps = state["nadir"], state["steps"]
        logs = losses.log()
        above = torch.where(losses > 0, torch.where(nadir > 0, logs - nadir.log(), 0), -torch.inf)
        shares = (above / self.mu).log_softmax(-1) + math.log(losses.shape[-1])
        weights = (torch.where(steps < self.warmup, 0, shares) - logs).exp()

        averaged = max(1, self.warmup // 5)
        averaging = (steps >= self.warmup - averaged) & (steps < self.warmup)
        self._keep(counts & averaging, nadir=nadir + losses / averaged)
        self._keep(counts, steps=steps + 1)
        return torch.where(losses > 0, weights, 0)
