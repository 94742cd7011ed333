# SPDX-License-Identifier: MIT
"""ExcessMTL: more weight to tasks that are far from their optimum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._base import check_positive
from ._buffered import BufferedMethod, Rows


class ExcessMTL(BufferedMethod):
    """Robust multi-task learning with excess risks (He et al., ICML 2024, equations 6, 7 and 9).

    The excess risk of a task is estimated as e_t = sum_n g_tn^2 / sqrt(S_tn), S the sum of the squared gradients of all
    steps so far; w_t <- w_t exp(eta e_t / e_t(0)), scaled to sum to T, with e_t(0) that of the first step, which leaves
    the weights at 1.

    Conventions: S = 0 adds nothing to e (the authors add 1e-7 to S); where e_t(0) = 0 the first later e_t > 0 takes its
    place. They are loss weights: they also multiply the gradients of the heads. The step does not depend on the
    gradients' scale.
    Scale: sums to T. State: S, w and e(0). Memory: T N.

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

    def _initial(self, gram: Tensor) -> dict[str, Tensor]:
        return {"w": torch.ones_like(gram[0]), "first": torch.zeros_like(gram[0])}

    def _replace(
        self, rows: Rows, gram: Tensor, losses: Tensor | None, scale: Tensor | None, backend: str | None
    ) -> Rows:
        assert self._buffers is not None
        assert self._state is not None
        if scale is not None:
            rows = [[None if g is None else g / scale.to(g.dtype) for g in row] for row in rows]
        excess = torch.stack([self._excess(row, sums) for row, sums in zip(rows, self._buffers, strict=True)])
        first = torch.where(self._state["first"] > 0, self._state["first"], excess)
        started = self._state["first"] > 0
        growth = torch.where(started, self.eta * excess / first, 0)
        w = len(gram) * (self._state["w"].log() + growth).softmax(0)
        self._keep(w=w, first=first)
        return rows

    def _excess(self, row: Sequence[Tensor | None], sums: list[Tensor]) -> Tensor:
        """Return e of one task, float64 [], and add its squares to S."""
        pairs = [(g, s) for g, s in zip(row, sums, strict=True) if g is not None]
        total = torch.zeros((), dtype=torch.float64, device=sums[0].device)
        for g, s in pairs:
            square = torch.where(self._finite, g, 0).square()
            s += square
            total += torch.where(s > 0, square / s.sqrt(), 0).sum(dtype=torch.float64)
        return total

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights [T]."""
        return self._nan_unless_finite(self._started()["w"].clone())
