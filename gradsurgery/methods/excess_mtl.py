# SPDX-License-Identifier: MIT
"""ExcessMTL: more weight to tasks that are far from their optimum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .._checks import check_positive
from ..combine import combine
from ._buffered import BufferedMethod, Given, Rows

_CHUNK_BYTES = 16 << 20


class ExcessMTL(BufferedMethod):
    """Robust multi-task learning with excess risks (He et al., ICML 2024, equations 6, 7 and 9).

    The excess risk of a task is estimated as e_t = sum_n g_tn^2 / sqrt(S_tn), S the sum of the squared gradients of all
    steps so far; w_t <- w_t exp(eta e_t / e_t(0)), scaled to sum to T. e_t(0) is the estimate of the first step, which
    leaves the weights at 1.

    Conventions: S = 0 adds nothing to e (the authors add 1e-7 to S); if e_t(0) = 0, the first later e_t > 0 takes its
    place. They are loss weights: they also multiply the gradients of the heads. The step on w does not depend on the
    gradients' scale.
    Scale: sums to T. State: sqrt(S), in float32 at least, w and e(0). Memory: T N.

    Args:
        eta: > 0.
    """

    name = "excess_mtl"
    weights_losses = True
    scale = "sums to T"
    cost = "T"
    state_names = ("w", "first")

    def __init__(self, eta: float = 1e-2) -> None:
        self.eta = check_positive("eta", eta)

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        return {"w": torch.ones_like(like), "first": torch.zeros_like(like)}

    def _replace(self, given: Given) -> Rows:
        assert self._buffers is not None
        assert self._state is not None
        rows, scale = given.rows, given.scale
        of_each = [self._excess(given, row, roots) for row, roots in zip(rows, self._buffers, strict=True)]
        excess = given.total(torch.stack(of_each))
        started = self._state["first"] > 0
        first = torch.where(started, self._state["first"], excess)
        growth = torch.where(started, self.eta * excess / first, 0)
        # A weight that has become 0 may grow again.
        w = len(rows) * (self._state["w"].clamp(min=torch.finfo(torch.float64).tiny).log() + growth).softmax(0)
        self._keep(given.finite, w=w, first=first)
        if scale is None:
            return rows
        unscaled = combine([[g for row in rows for g in row]], 1 / scale.double().reshape(1), backend=given.backend)
        each = iter(unscaled)
        return [[next(each) for _ in row] for row in rows]

    def _kept_in(self, dtype: torch.dtype) -> torch.dtype:
        # Sums of 16-bit squares would stop growing, or overflow.
        return torch.promote_types(dtype, torch.float32)

    def _excess(self, given: Given, row: Sequence[Tensor | None], roots: list[Tensor]) -> Tensor:
        """Return e of one task, float64 [], and add its squares to S, whose root does not overflow."""
        total = torch.zeros((), dtype=torch.float64, device=roots[0].device)
        # Many small parameters at a time: a few operations for all of them, and little memory.
        chunks: dict[tuple[int, bool], list[tuple[Tensor, Tensor]]] = {}
        end = 0
        for gradient, root, here in zip(row, roots, given.counted, strict=True):
            if gradient is not None and gradient.numel() > 0:
                end += root.nbytes
                chunks.setdefault((end // _CHUNK_BYTES, here), []).append((gradient, root))
        for (_, here), chunk in chunks.items():
            gradients, kept = (list(values) for values in zip(*chunk, strict=True))
            before = _flatten_dense_tensors(kept)
            size = torch.where(given.finite, _flatten_dense_tensors(gradients), 0).to(before.dtype)
            if given.scale is not None:
                size /= given.scale.to(size.dtype)
            root = torch.hypot(before, size)
            torch._foreach_copy_(kept, _unflatten_dense_tensors(root, kept))
            root.clamp_(min=torch.finfo(root.dtype).tiny)  # 0 / 0 is 0 here
            if here:
                total += torch.div(size, root, out=root).mul_(size).sum(dtype=torch.float64)
        return total

    def _weigh(self, given: Given, gram: Tensor) -> Tensor:
        assert self._state is not None
        return self._state["w"]
