# SPDX-License-Identifier: MIT
"""SDMGrad: a common descent direction near the preferred one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_count, check_fraction, check_not_negative, check_positive
from ..functional import simplex_steps
from ._simplex import SimplexMethod
from ._state import PerTask


class SDMGrad(SimplexMethod):
    """Stochastic direction-oriented multi-objective descent (Xiao, Ban & Ji, NeurIPS 2023, Algorithm 1).

    w takes ``num_iter`` projected gradient steps with momentum towards the minimum of |J^T w + lam J^T p|^2 / 2 over
    the simplex, with C = J_1 J_2^T of two independent batches in place of J J^T, J_b the task gradients of batch b as
    rows; then d = J_3^T (w + lam p) / (1 + lam) with a third batch.

    Conventions: C is divided by s^2, s the mean of sqrt(max(C_tt, 0)), so that the steps do not depend on the
    gradients' scale (the authors add 1e-8 to s^2; here C = 0 where s = 0). The momentum starts anew at each call, w
    does not.
    Batches as in :class:`MoDo`.
    Scale: sums to 1. State: w. Cost: O(num_iter T^2).

    Args:
        lam: lambda >= 0, the pull towards the preferred direction.
        lr: step of the iterations, > 0. The default is LibMTL's; such long steps overshoot the minimum, and magnify
            rounding, so that results differ between backends.
        momentum: 0 <= momentum < 1.
        num_iter: iterations a step, >= 1.
        pref: p, T numbers that sum to 1; None: 1 / T each.
    """

    name = "sdmgrad"
    num_batches = 3
    weights_from = "G, of 1 or 3 batches"
    scale = "sums to 1"
    cost = "num_iter T^2"

    def __init__(
        self,
        lam: float = 0.3,
        lr: float = 5.0,
        momentum: float = 0.5,
        num_iter: int = 20,
        pref: Sequence[float] | Tensor | None = None,
    ) -> None:
        self.lam = check_not_negative("lam", lam)
        self.lr = check_positive("lr", lr)
        self.momentum = check_fraction("momentum", momentum, one=False)
        self.num_iter = check_count("num_iter", num_iter)
        self.pref = None if pref is None else PerTask("pref", pref, "numbers that sum to 1", _sums_to_1)

    def _step(self, gram: Tensor, w: Tensor, backend: str | None) -> Tensor:
        scale = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().mean(-1)[..., None, None].square()
        c = torch.where(scale == 0, gram * 0, gram / scale)  # NaN where G is not finite
        # C (w + lam p), for sum(w) = 1.
        pulled = c + self.lam * (c @ self._preferred(w)[:, None])
        return simplex_steps(pulled, w, self.lr, self.momentum, self.num_iter, backend)

    def _direction(self, w: Tensor) -> Tensor:
        return (w + self.lam * self._preferred(w)) / (1 + self.lam)

    def _preferred(self, w: Tensor) -> Tensor:
        """Return p [T], for weights [..., T]."""
        if self.pref is None:
            return w.new_full(w.shape[-1:], 1 / w.shape[-1])
        return self.pref.on(w.device, w.shape[-1], self.name)


def _sums_to_1(values: Tensor) -> Tensor:
    return (values.sum() - 1).abs() <= 1e-6
