# SPDX-License-Identifier: MIT
"""The coordinate-wise median."""

from __future__ import annotations

import torch

from .._extension import Rule
from ._coordinate import CoordinateMethod


class CoordinateMedian(CoordinateMethod):
    """The median of each coordinate (Yin et al., ICML 2018, definition 1).

    d_i is the middle one of the T values g_{t,i}, or, for an even T, the mean of the two in the middle. This is the
    trimmed mean with k = floor((T - 1) / 2).

    Scale: a mean of the middle values. No state. Cost: one read of the gradients, one write of the direction, O(T^2)
    operations per coordinate.
    """

    name = "coordinate_median"
    scale = "mean of the middle values"
    cost = "T^2 per coordinate"

    def rule(self, device: torch.device, num_tasks: int) -> Rule:
        """Return how many values lie on either side of the middle."""
        return Rule("trimmed_mean", ((num_tasks - 1) // 2,))
