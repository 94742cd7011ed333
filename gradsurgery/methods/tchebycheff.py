# SPDX-License-Identifier: MIT
"""Weighted Tchebycheff scalarisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ._preferences import PreferenceMethod


class Tchebycheff(PreferenceMethod):
    """Weighted Tchebycheff scalarisation (Bowman 1976; Miettinen 1999): f = max_t p_t (L_t - z_t).

    w_t = df / dL_t: p_t for the task of the maximum, 0 for the others; of equal tasks the first one counts.

    Conventions: no absolute value of L_t - z_t, so that a loss below its z is not pushed back up. If z is a lower bound
    of the losses, as it should be, the absolute value would make no difference.
    Scale: w sums to the p of the worst task. Losses of any sign. No state.

    Args:
        pref: p, T positive numbers, taken as given. None: 1 / T each.
        ideal: z, T finite numbers. None: 0.
    """

    name = "tchebycheff"
    scale = "sums to one preference"

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        p = self._preferred(losses)
        worst = (p * self._excess(losses)).argmax(-1, keepdim=True)
        return torch.zeros_like(losses).scatter_(-1, worst, p.gather(-1, worst))
