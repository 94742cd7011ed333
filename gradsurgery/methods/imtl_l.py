# SPDX-License-Identifier: MIT
"""IMTL-L: scaled losses of equal size."""

from __future__ import annotations

from torch import Tensor

from ._losses import TrainedScales


class IMTLL(TrainedScales):
    """The loss balance of impartial multi-task learning (Liu et al., ICLR 2021).

    f = sum_t e^s_t L_t - s_t. w_t = e^s_t; then s_t <- s_t - lr (w_t L_t - 1), whose fixed point is w_t = 1 / L_t:
    scaled losses of 1.

    Conventions: s is trained here by plain gradient descent, not by the wrapped optimizer, without weight decay; a step
    uses s from before its update. The step on s grows with the loss: for losses far above 1 / lr start at ``initial`` =
    -log L, or s overshoots and takes long to come back. A loss that stays 0 or below has no best s: s grows. s is kept
    from -80 to 80.
    The paper's gradient balance, IMTL-G, is a method of its own.
    Scale: 1 at s = 0. State: s [..., T].

    Args:
        lr: step on s, >= 0.
        initial: s before the first step, from -80 to 80; a number, or T of them.
    """

    name = "imtl_l"
    scale = "1 at the start"

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        s = self._state_for(losses)["s"]
        weights = s.exp()
        self._descend(counts, s, weights * losses - 1)
        return weights
