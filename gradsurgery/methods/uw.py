# SPDX-License-Identifier: MIT
"""Uncertainty weighting."""

from __future__ import annotations

from torch import Tensor

from ._losses import TrainedScales


class UW(TrainedScales):
    """Weighting by homoscedastic uncertainty (Kendall, Gal & Cipolla, CVPR 2018).

    f = sum_t L_t / (2 e^s_t) + s_t / 2, with s_t = log sigma_t^2 the logarithm of task t's noise variance. w_t = e^-s_t
    / 2; then s_t <- s_t - lr (1 / 2 - w_t L_t), whose fixed point is s_t = log L_t.

    Conventions: s is trained here by plain gradient descent, not by the wrapped optimizer, without weight decay; a step
    uses s from before its update. The step on s grows with the loss: for losses far above 1 / lr start at ``initial`` =
    log L, or s overshoots and takes long to come back. A loss that stays 0 or below has no best s: s falls. s is kept
    from -80 to 80. (LibMTL starts at s = -0.5.)
    Scale: 1 / 2 at s = 0; at the fixed point w_t = 1 / (2 L_t). State: s [..., T].

    Args:
        lr: step on s, >= 0 (0.025 as in Nash-MTL's code).
        initial: s before the first step, from -80 to 80; a number, or T of them.
    """

    name = "uw"
    scale = "1 / 2 at the start"

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        s = self._state_for(losses)["s"]
        weights = (-s).exp() / 2
        self._descend(counts, s, 0.5 - weights * losses)
        return weights
