# SPDX-License-Identifier: MIT
"""GLS: the geometric mean of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ._losses import LossMethod


class GLS(LossMethod):
    """Geometric loss strategy (Chennupati et al., "MultiNet++", CVPR workshops 2019): f = (prod_t L_t)^(1 / T).

    w_t = df / dL_t = f / (T L_t). Multiplying one loss by a factor scales the whole direction, but does not turn it.

    Conventions: losses must not be negative (NaN weights). A loss of 0 is left out of the mean, because f has no
    gradient there and would take all weight from the others: its weight is 0, and T counts the others.
    Scale: sum_t w_t L_t = f. No state. Computed in logarithms.
    """

    name = "gls"
    scale = "w . L = geometric mean"
    takes_logarithms = True

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        present = losses > 0
        logs = torch.where(present, losses, 1).log()
        number = present.sum(-1, keepdim=True)
        weights = (logs.sum(-1, keepdim=True) / number - logs).exp() / number
        return torch.where(present, weights, 0)
