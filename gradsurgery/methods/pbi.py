# SPDX-License-Identifier: MIT
"""PBI: penalty-based boundary intersection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_not_negative
from ._preferences import PreferenceMethod, across, unit


class PBI(PreferenceMethod):
    """Penalty-based boundary intersection (Zhang & Li, "MOEA/D", IEEE Trans. Evol. Comput. 2007).

    f = d1 + theta d2, where d1 = (L - z) . u is how far the losses are along the preferred direction u = p / |p|, and
    d2 = |L - z - d1 u| is their distance from that line. w = df / dL = u + theta (L - z - d1 u) / d2.

    Conventions: w = u where d2 is 0 to rounding (4 T eps |L - z|). Weights may be negative: a task that does better
    than preferred is held back. They do not depend on the scale of the losses.
    Scale: w . u = 1. Losses of any sign. No state.

    Args:
        theta: penalty, >= 0 (5 as in the paper).
        pref: p, T positive numbers, of which only the direction matters. None: all alike.
        ideal: z, T finite numbers. None: 0.
    """

    name = "pbi"
    scale = "w . u = 1"

    def __init__(
        self,
        theta: float = 5.0,
        pref: Sequence[float] | Tensor | None = None,
        ideal: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(pref, ideal)
        self.theta = check_not_negative("theta", theta)

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        direction, _ = unit(self._preferred(losses))
        excess, _ = unit(self._excess(losses))
        off, length = across(excess, direction)
        return direction + self.theta * off / torch.where(length == 0, 1, length)
