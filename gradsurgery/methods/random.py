# SPDX-License-Identifier: MIT
"""RLW: random loss weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._philox import philox_words
from ..functional import check_gram
from ._base import SteppedMethod, nan_unless_finite

_ROW = 0xFFFFFFFF
"""In the counter of the random numbers, where PCGrad's visiting orders have a task."""


class Random(SteppedMethod):
    """Random loss weighting (Lin et al., "Reasonable Effectiveness of Random Weighting", TMLR 2022).

    w = softmax(z) with z_t ~ N(0, 1), drawn anew at each step; all problems of a batch have the same weights.

    Conventions: z comes from the words u of Philox4x32-10 (key ``seed``, counter (step, 2^32 - 1, block)) by Box and
    Muller's method, z_t = sqrt(-2 ln v_{2t}) cos(2 pi v_{2t+1}), v = (u + 1/2) / 2^32: the same on every rank and, to
    rounding, on every device, without a global generator.
    Scale: sums to 1. They are loss weights: they also multiply the gradients of the heads. State: ``seed`` and the step
    counter.

    Args:
        seed: key of the weights; the same on every rank. 0 <= seed < 2^63.
    """

    name = "random"
    needs_gram = False
    weights_losses = True
    needs = "nothing"
    scale = "sums to 1"
    linear = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the step's weights, NaN where G is not finite, and advance the step counter."""
        gram = check_gram(gram)
        step = self._step_on(gram.device)
        row = torch.full((1,), _ROW, device=gram.device)
        uniform = (philox_words(row, 2 * gram.shape[-1], self.seed, step)[0].double() + 0.5) / 2**32
        radius, angle = uniform.unflatten(0, (-1, 2)).unbind(1)
        normal = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
        step += 1
        return nan_unless_finite(normal.softmax(0), gram)
