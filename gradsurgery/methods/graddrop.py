# SPDX-License-Identifier: MIT
"""GradDrop: at each coordinate the gradients of one sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._extension import Rule
from ._coordinate import CoordinateMethod
from ._state import PerTask
from ._stateful import SteppedMethod


class GradDrop(SteppedMethod, CoordinateMethod):
    """Gradient sign dropout (Chen et al., "Just Pick a Sign", NeurIPS 2020, Algorithm 1).

    At each coordinate P = (1 + sum_t g_t / sum_t |g_t|) / 2, and u in (0, 1) is a random number that all tasks share.
    Kept are the positive values where P > u and the negative ones where P < u; d = sum_t (l_t + (1 - l_t) m_t) g_t with
    m_t = 1 for what is kept, else 0.

    Conventions: no epsilon; where all gradients are 0, so is d. P is computed from the gradients with respect to the
    parameters, or, with mode="representation", with respect to the features, for each sample by itself (the paper and
    LibMTL multiply by the features' signs and add up the samples first); f(P) = P. u is a pure function of (seed, step,
    i), i the number of the coordinate: u = (w + 1/2) / 2^32 with w = word i mod 4 of Philox4x32-10, key ``seed``,
    counter (step, 2^31 + floor(b / 2^32), b mod 2^32), b = floor(i / 4). Coordinates are numbered over the parameters
    that some task has a gradient of, in their order, and within each in the order of the gradients' memory, which other
    modes of ``backward``, and several processes, may lay out differently. u is the same on every backend and rank and
    for every number of threads, without a global generator; so the features of several processes' samples share the
    same random numbers.
    Scale: a sum over tasks. State: ``seed`` and the step counter, which lives on the gradients' device and is not read
    on the host.
    Cost: one read of the gradients, one write of the direction, O(T) operations per coordinate.

    Args:
        seed: key of the random numbers; the same on every rank. 0 <= seed < 2^63.
        leak: T numbers l_t in [0, 1]; default 0 each.
    """

    name = "graddrop"
    takes_shards = False
    scale = "sum"
    cost = "T per coordinate"

    def __init__(self, seed: int = 0, leak: Sequence[float] | Tensor | None = None) -> None:
        super().__init__(seed)
        self.leak = None
        if leak is not None:
            self.leak = PerTask("leak", leak, "numbers in [0, 1]", lambda share: (share >= 0) & (share <= 1))

    def rule(self, device: torch.device, num_tasks: int) -> Rule:
        """Return the seed, the step counter and the leaks.

        Raises:
            ValueError: ``leak`` is not one number for each task.
        """
        step = self._step_on(device)
        leak = None if self.leak is None else self.leak.on(device, num_tasks, self.name)
        return Rule("graddrop", (self.seed, step, leak))
