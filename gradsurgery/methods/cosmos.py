# SPDX-License-Identifier: MIT
"""COSMOS: a weighted sum that is drawn towards a direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_not_negative
from ._preferences import PreferenceMethod, across, unit


class COSMOS(PreferenceMethod):
    """The objective of COSMOS (Ruchte & Grabocka, ICDM 2021).

    f = p . L - penalty cos(p, L), cos(p, L) = p . L / (|p| |L|). w = df / dL = p - penalty (u - cos(p, L) v) / |L|,
    with u = p / |p| and v = L / |L|.

    Conventions: the second term is 0 where p and L are parallel to rounding, and where L = 0. w depends on the scale of
    the losses, as in the paper: penalty has the unit of a loss. Weights may be negative. The paper also feeds p to the
    model, which is left to the user.
    Scale: w . L = p . L. Losses of any sign. No state.

    Args:
        penalty: lambda, >= 0. The paper has values from 0.01 to 8.
        pref: p, T positive numbers, taken as given. None: 1 / T each.
    """

    name = "cosmos"
    scale = "w . L = p . L"

    def __init__(self, penalty: float = 1.0, pref: Sequence[float] | Tensor | None = None) -> None:
        super().__init__(pref)
        self.penalty = check_not_negative("penalty", penalty)

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        p = self._preferred(losses)
        direction, size = unit(losses)
        towards, _ = across(unit(p)[0], direction)
        return torch.where(size == 0, p, p - self.penalty * towards / size)
