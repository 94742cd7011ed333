# SPDX-License-Identifier: MIT
"""The sum of the losses' logarithms."""

from __future__ import annotations

import torch
from torch import Tensor

from ._losses import LossMethod


class ScaleInvariant(LossMethod):
    """Scale-invariant linear scalarisation, a baseline of Navon et al. (Nash-MTL, ICML 2022): f = sum_t log L_t.

    w_t = df / dL_t = 1 / L_t. Multiplying a loss by a factor leaves the direction as it is.

    Conventions: losses must not be negative (NaN weights). A loss of 0 is left out: weight 0.
    Scale: sum_t w_t L_t = T. No state.
    """

    name = "scale_invariant"
    scale = "w . L = T"
    takes_logarithms = True

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        return torch.where(losses > 0, 1 / losses, 0)
