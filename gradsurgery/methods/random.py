# SPDX-License-Identifier: MIT
"""RLW: random loss weights."""

from __future__ import annotations

from torch import Tensor

from .._constant import constant
from ..backends import choose
from ..functional import new_problems
from ._stateful import SteppedMethod


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
    weights_from = "nothing"
    scale = "sums to 1"
    linear = True

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the step's weights, NaN where G is not finite, and advance the step counter."""
        problems, out = new_problems(gram)
        choose(backend, gram.device, gram.shape[-1]).random(problems, self.seed, self._step_on(gram.device), out)
        return constant(f"{self.name} weights", out, [gram])
