# SPDX-License-Identifier: MIT
"""The coordinate-wise trimmed mean."""

from __future__ import annotations

import torch

from .._checks import check_count
from .._extension import Rule
from ._coordinate import CoordinateMethod


class TrimmedMean(CoordinateMethod):
    """The mean of the middle values of each coordinate (Yin et al., ICML 2018, definition 2).

    d_i is the mean of the T - 2 k values g_{t,i} that are neither among the k largest nor among the k least.

    Conventions: k = min(num_trimmed, floor((T - 1) / 2)), so that T <= 2 num_trimmed gradients still have a middle; k
    is a number of values, where the paper has the fraction k / T. The middle values are selected by comparisons and
    only then summed, so outliers of any size leave no rounding errors behind.
    Scale: a mean of the middle values. No state. Cost: one read of the gradients, one write of the direction, O(T k)
    operations per coordinate.

    Args:
        num_trimmed: >= 0.
    """

    name = "trimmed_mean"
    scale = "mean of the middle values"
    cost = "T k per coordinate"

    def __init__(self, num_trimmed: int = 1) -> None:
        self.num_trimmed = check_count("num_trimmed", num_trimmed, least=0)

    def rule(self, device: torch.device, num_tasks: int) -> Rule:
        """Return how many values are left out at either end."""
        return Rule("trimmed_mean", (min(self.num_trimmed, (num_tasks - 1) // 2),))
