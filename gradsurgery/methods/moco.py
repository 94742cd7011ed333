# SPDX-License-Identifier: MIT
"""MoCo: min-norm weights of tracked gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_fraction, check_not_negative, check_positive
from ..functional import simplex_steps
from ._buffered import BufferedMethod, Given, Rows


class MoCo(BufferedMethod):
    """Multi-objective gradient correction (Fernando et al., ICLR 2023, Algorithm 1).

    At step k the tracked gradients y_t <- y_t - beta_k (y_t - h_t) follow the task gradients, and the weights take a
    step towards the shortest combination of them: w <- P(w - gamma_k (Y Y^T + rho I) w), P the projection on the
    simplex; d = sum_t w_t y_t.

    Conventions: h_t = L_t g_t / |g_t|, as in LibMTL, so that the steps do not depend on the gradients' scale; a zero
    gradient stays 0. A task whose loss is far below the others' thus gets nearly all of the weight. If a loss is
    negative, which would reverse its gradient, or makes y infinite, the weights are NaN and the state stays. beta_k =
    beta / sqrt(k), gamma_k = gamma / sqrt(k). y = 0 and w = 1 / T at first. The projection is the paper's (LibMTL: a
    softmax). Heads get their plain gradients. y has the gradients' dtype: in bfloat16 it no longer follows h if beta_k
    is below 2^-9, by default after 65,536 steps; in float16 its entries are limited to 65,504.
    Scale: sums to 1. State: y, w and k. Memory: T N. G and the weights are those of y.

    Args:
        beta: 0 < beta <= 1.
        gamma: > 0.
        rho: >= 0.
    """

    name = "moco"
    needs_losses = True
    weights_from = "gradients, losses"
    scale = "sums to 1"
    cost = "T^2"
    state_names = ("step", "w")

    def __init__(self, beta: float = 0.5, gamma: float = 0.1, rho: float = 0.0) -> None:
        self.beta = check_fraction("beta", beta, zero=False)
        self.gamma = check_positive("gamma", gamma)
        self.rho = check_not_negative("rho", rho)

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        step = torch.zeros((), dtype=torch.int64, device=like.device)
        return {"step": step, "w": torch.full_like(like, 1 / len(like))}

    def _replace(self, given: Given) -> Rows:
        assert given.losses is not None
        assert self._state is not None
        given.finite = given.finite & (given.losses >= 0).all()
        step = self._state["step"] + 1
        beta = self.beta / step.double().sqrt()
        norms = given.gram.diagonal().sqrt()
        factor = torch.where(norms > 0, beta * given.losses / norms, 0)
        buffers = self._average(given, 1 - beta, factor)
        self._keep(given.finite, step=step)
        return buffers

    def _weigh(self, given: Given, gram: Tensor) -> Tensor:
        assert self._state is not None
        step, w = (self._state[name] for name in self.state_names)
        matrix = gram + self.rho * torch.eye(len(w), dtype=w.dtype, device=w.device)
        # The step's length is on the device.
        moved = simplex_steps(self.gamma / step.double().sqrt() * matrix, w, 1.0, 0.0, 1, given.backend)
        self._keep(given.finite, w=moved)
        return w
