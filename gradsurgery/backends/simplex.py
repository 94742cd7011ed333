# SPDX-License-Identifier: MIT
"""Projection on the simplex, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def project_on_simplex(x: Tensor) -> Tensor:
    """Return argmin |w - x| with w >= 0 and sum(w) = 1, for x [..., T] (Held, Wolfe & Crowder 1974)."""
    x = x - x.amax(-1, keepdim=True)  # or large entries would swallow the 1
    number = torch.arange(1, x.shape[-1] + 1, device=x.device)
    descending = x.sort(-1, descending=True).values
    shift = (descending.cumsum(-1) - 1) / number
    positive = (descending > shift).sum(-1, keepdim=True).clamp(min=1)
    return (x - shift.gather(-1, positive - 1)).clamp(min=0)
