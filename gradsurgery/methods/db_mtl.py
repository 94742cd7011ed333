# SPDX-License-Identifier: MIT
"""DB-MTL: losses balanced by logarithms, gradients by their averaged norms."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_fraction, check_not_negative
from ._buffered import BufferedMethod, Given, Rows


class DBMTL(BufferedMethod):
    """Dual-balancing multi-task learning (Lin et al., 2023, Algorithm 1).

    With the gradients of the losses' logarithms, h_t = g_t / L_t, step k averages b_t <- c b_t + (1 - c) h_t, c = beta
    / k^sigma, b = 0 at first; then d = sum_t (max_s |b_s| / |b_t|) b_t: all averages are made as long as the longest.

    Conventions: no epsilons (the authors': 1e-8 on the loss and on the norm). A loss of 0 leaves its b_t as it is; if a
    loss is negative, or makes b infinite, the weights are NaN and the state stays. A zero b_t has weight 0. Heads get
    their plain gradients. b has the gradients' dtype: in bfloat16 it no longer follows h if 1 - c is below 2^-9; in
    float16 its entries are limited to 65,504, which a loss of 1e-6, for example, may reach.
    Scale: a sum of vectors as long as the longest average. State: b and k. Memory: T N. G and the weights are those of
    b.

    Args:
        beta: 0 <= beta < 1.
        sigma: >= 0, how fast the averaging ends.
    """

    name = "db_mtl"
    needs_losses = True
    weights_from = "gradients, losses"
    scale = "as long as the longest each"
    cost = "T"
    state_names = ("step",)

    def __init__(self, beta: float = 0.9, sigma: float = 0.0) -> None:
        self.beta = check_fraction("beta", beta, one=False)
        self.sigma = check_not_negative("sigma", sigma)

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        return {"step": torch.zeros((), dtype=torch.int64, device=like.device)}

    def _replace(self, given: Given) -> Rows:
        assert given.losses is not None
        assert self._state is not None
        losses = given.losses
        given.finite = given.finite & (losses >= 0).all()
        step = self._state["step"] + 1
        keep = torch.where(losses > 0, self.beta / step.double() ** self.sigma, 1)
        buffers = self._average(given, keep, torch.where(losses > 0, (1 - keep) / losses, 0))
        self._keep(given.finite, step=step)
        return buffers

    def _weigh(self, given: Given, gram: Tensor) -> Tensor:
        norms = gram.diagonal().sqrt()
        return torch.where(norms > 0, norms.max() / norms, 0)
