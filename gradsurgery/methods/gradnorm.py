# SPDX-License-Identifier: MIT
"""GradNorm: loss weights that equalise training rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import gradnorm_update
from ._base import Method


class GradNorm(Method):
    """Loss weights that equalise the training rates (Chen et al., ICML 2018). See :func:`gradsurgery.gradnorm_update`.

    Each step uses the current weights and then updates them, in closed form: no second backward pass. The weights
    start at 1 and sum to T. They are loss weights: they also multiply the gradients of the heads. State: the
    weights, and the losses of the first step, which stand for L(0).

    Args:
        alpha: restoring force; 0 equalises the gradient norms.
        lr: step on the weights.
        norm_parameters: the parameters over which the norms are taken (the paper: the last shared layer); default
            all shared parameters. Read by the optimizers; ``weights`` itself takes the norms from the G that it is
            given.
    """

    name = "gradnorm"
    needs_losses = True
    weights_losses = True

    def __init__(self, alpha: float = 1.5, lr: float = 0.025, norm_parameters: Sequence[Tensor] | None = None) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must be >= 0, got {lr}")
        self.alpha = alpha
        self.lr = lr
        self.gram_parameters = None if norm_parameters is None else list(norm_parameters)
        self._weights: Tensor | None = None
        self._initial_losses: Tensor | None = None

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the current weights [..., T] and update them."""
        if losses is None:
            raise ValueError("GradNorm needs losses, a tensor [T], got None")
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        losses = losses.detach().to(norms).expand_as(norms)
        if self._weights is None or self._initial_losses is None:
            current, initial = torch.ones_like(norms), losses.clone()
        elif self._weights.shape == norms.shape:
            current, initial = self._weights.to(gram.device), self._initial_losses.to(gram.device)
        else:
            raise ValueError(
                f"GradNorm's state is for weights of shape {tuple(self._weights.shape)}, got G of shape "
                f"{tuple(gram.shape)}"
            )
        # Values that are not finite, as in a step that a gradient scaler will skip, must not enter the state; nor may a
        # loss of 0, of a task without samples in the first batch, stand for L(0).
        initial = torch.where(initial.isfinite() & (initial > 0), initial, losses)
        updated = gradnorm_update(current, norms, losses, initial, alpha=self.alpha, lr=self.lr, backend=backend)
        self._weights = torch.where(updated.isfinite().all(-1, keepdim=True), updated, current)
        self._initial_losses = initial
        return torch.where(norms.isfinite().all(-1, keepdim=True), current, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the initial losses; None before the first step."""
        return {
            "weights": None if self._weights is None else self._weights.clone(),
            "initial_losses": None if self._initial_losses is None else self._initial_losses.clone(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._weights, self._initial_losses = state["weights"], state["initial_losses"]
