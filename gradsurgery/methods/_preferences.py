# SPDX-License-Identifier: MIT
"""Scalarisations with a preference among the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._losses import LossMethod
from ._state import PerTask


class PreferenceMethod(LossMethod):
    """Weights from the losses and, both optional, a preference p (T positive numbers) and an ideal point z."""

    def __init__(
        self, pref: Sequence[float] | Tensor | None = None, ideal: Sequence[float] | Tensor | None = None
    ) -> None:
        self.pref = None if pref is None else PerTask("pref", pref, "positive numbers", lambda p: p > 0)
        self.ideal = None if ideal is None else PerTask("ideal", ideal)

    def _preferred(self, losses: Tensor) -> Tensor:
        """Return p as [..., T] like the losses, 1 / T each without a preference."""
        if self.pref is None:
            return torch.full_like(losses, 1 / losses.shape[-1])
        return self.pref.on(losses.device, losses.shape[-1], self.name).expand_as(losses)

    def _excess(self, losses: Tensor) -> Tensor:
        """Return L - z [..., T]."""
        return losses if self.ideal is None else losses - self.ideal.on(losses.device, losses.shape[-1], self.name)


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x / |x| [..., T], 0 where x = 0, and |x| [..., 1]; no square overflows."""
    largest = x.abs().amax(-1, keepdim=True)
    scaled = x / torch.where(largest == 0, 1, largest)
    length = scaled.square().sum(-1, keepdim=True).sqrt()
    return scaled / torch.where(length == 0, 1, length), largest * length


def across(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part [..., T] of unit vectors a that is orthogonal to b, and its length; 0 if it is but rounding."""
    part = a - (a * b).sum(-1, keepdim=True) * b
    length = part.square().sum(-1, keepdim=True).sqrt()
    kept = length > 4 * a.shape[-1] * torch.finfo(a.dtype).eps
    return torch.where(kept, part, 0), torch.where(kept, length, 0)
