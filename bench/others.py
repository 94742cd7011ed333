# SPDX-License-Identifier: MIT
"""Calls of PyTorch and of other packages, which are imported only when needed: a GPU machine may lack them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BMM = "torch.bmm by blocks"
"""PyTorch's products of blocks of columns, which read J faster than one product of long rows."""
BLOCK = 512
"""Columns of one product on a CPU, where this is the fastest of 128 to 62,500 for 8 tasks (by hand)."""
TORCHJD = {"pcgrad": "PCGrad", "mgda": "MGDA", "upgrad": "UPGrad", "cagrad": "CAGrad"}
"""torchjd's aggregators by the name of the method here."""


def blockwise_products(gradients: Tensor, columns: int = BLOCK) -> Tensor:
    """Return J J^T the fastest way in PyTorch: products of blocks of columns, summed in float64."""
    rest = gradients.shape[1] % columns
    blocks = gradients[:, rest:].unflatten(1, (-1, columns)).movedim(1, 0)
    return torch.bmm(blocks, blocks.mT).sum(0, dtype=torch.float64) + gradients[:, :rest] @ gradients[:, :rest].T


def conflict_projection(rows: list[Tensor]) -> Callable[[], Tensor]:
    """Return pytorch_optimizer's PCGrad from flat task gradients to the direction. It shuffles the list itself."""
    from pytorch_optimizer import PCGrad

    # Masks of one element: reduction="sum" does not need them, so only the projections take time.
    masks = [torch.ones(1, device=row.device) for row in rows]
    wrapper = PCGrad(torch.optim.SGD([torch.zeros(1)], lr=1.0), reduction="sum")
    return lambda: wrapper.project_conflicting(rows, masks)


def jacobian_descent(method: str) -> Callable[[Tensor], Tensor]:
    """Return torchjd's aggregator from J [T, N] to the direction, CAGrad with the constant that is usual here."""
    from torchjd import aggregation

    options = {"c": 0.5} if method == "cagrad" else {}
    return getattr(aggregation, TORCHJD[method])(**options)
