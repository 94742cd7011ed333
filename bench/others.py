# SPDX-License-Identifier: MIT
"""Calls of other packages, imported when they are asked for: a GPU machine may lack them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TORCHJD = {"pcgrad": "PCGrad", "mgda": "MGDA", "upgrad": "UPGrad", "cagrad": "CAGrad"}
"""torchjd's aggregators by the name of the method here."""


def conflict_projection(rows: list[Tensor]) -> Callable[[], Tensor]:
    """Return pytorch_optimizer's PCGrad from flat task gradients to the direction. It shuffles the list itself."""
    from pytorch_optimizer import PCGrad

    # One-element masks: with reduction="sum" they have no use, so only the projections take time.
    masks = [torch.ones(1, device=row.device) for row in rows]
    wrapper = PCGrad(torch.optim.SGD([torch.zeros(1)], lr=1.0), reduction="sum")
    return lambda: wrapper.project_conflicting(rows, masks)


def jacobian_descent(method: str) -> Callable[[Tensor], Tensor]:
    """Return torchjd's aggregator from J [T, N] to the direction, CAGrad with the constant that is usual here."""
    from torchjd import aggregation

    options = {"c": 0.5} if method == "cagrad" else {}
    return getattr(aggregation, TORCHJD[method])(**options)
