# SPDX-License-Identifier: MIT
"""FAMO: losses that fall at equal rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_not_negative
from ._losses import LossMethod
from ._state import numbers_of, read_losses

_BETAS = (0.9, 0.999)
_EPS = 1e-8


class FAMO(LossMethod):
    """Fast adaptive multitask optimization (Liu et al., NeurIPS 2023, Algorithm 1).

    With logits x and z = softmax(x), w_t = c z_t / L_t, 1 / c = sum_s z_s / L_s: d is the gradient of
    c sum_t z_t log L_t for a fixed c. After the optimizer's step, Adam takes a step on x, whose gradient is
    z_t (delta_t - sum_s z_s delta_s) + gamma x_t. delta_t = log L_t - log L'_t is the fall of the loss on the same
    batch, with L' the losses after the step: tasks whose losses have fallen less gain weight.

    Conventions: ``update(losses)`` takes L'. Without that call, the next step's losses stand for L': this saves the
    second evaluation, but weights lag by a step, and L and L' come from different batches. Adam as torch's: betas 0.9
    and 0.999, eps 1e-8 (the gradients have no unit), decay added to the gradient. No epsilon in the logarithms (the
    authors' code: 1e-8, which changes the method when losses are scaled): w = softmax(x - log L). The lower bounds of
    the losses are 0: losses must not be negative (NaN weights). A loss of 0 is left out: weight 0, delta 0. The
    authors' code also clips the norm of the shared gradients at 1, which is left to the user.
    Scale: sums to 1. State: x, Adam's averages and step count, the last losses, and whether their L' is still to come.

    Args:
        lr: Adam's step on x, >= 0.
        gamma: decay of x, >= 0 (0.01 as in the authors' famo.py; their benchmarks have 1e-5, LibMTL 1e-3).
    """

    name = "famo"
    scale = "sums to 1"
    takes_logarithms = True
    state_names = ("logits", "exp_avg", "exp_avg_sq", "losses", "updates", "pending")

    def __init__(self, lr: float = 0.025, gamma: float = 0.01) -> None:
        self.lr = check_not_negative("lr", lr)
        self.gamma = check_not_negative("gamma", gamma)

    def update(self, losses: Sequence[Any] | Mapping[str, Any] | Tensor) -> None:
        """Update the logits by the losses on the same batch after the optimizer's step.

        A second call before the next step changes nothing, and neither do losses that are negative or not finite. In
        training by several processes call :meth:`gradsurgery.SurgeryOptimizer.update`, which averages them.

        Args:
            losses: as for the optimizer's ``backward``; no graph is needed.

        Raises:
            ValueError: these are not T losses, or there has been no step.
        """
        if self._state is None:
            raise ValueError("update(losses) must come after a step, got it before the first one")
        before = self._state["losses"]
        if not isinstance(losses, Tensor):
            losses = numbers_of("losses", losses, before.device)
        after = read_losses(self.name, losses, before.shape, before.device)
        counts = self._counts(after)
        self._learn(after, counts)
        self._keep(counts, pending=torch.zeros_like(counts))

    def _initial(self, losses: Tensor) -> dict[str, Tensor]:
        state = {name: torch.zeros_like(losses) for name in self.state_names[:4]}
        state["updates"] = torch.zeros_like(losses[..., :1], dtype=torch.int64)
        state["pending"] = torch.zeros_like(losses[..., :1], dtype=torch.bool)
        return state

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        state = self._state_for(losses)
        self._learn(losses, counts)
        present = losses > 0
        weights = torch.where(present, state["logits"] - losses.log(), -torch.inf).softmax(-1)
        self._keep(counts, losses=losses, pending=torch.ones_like(counts))
        return torch.where(present, weights, 0)

    def _learn(self, after: Tensor, counts: Tensor) -> None:
        """Take Adam's step on the logits of those problems that count and whose second losses are still to come."""
        assert self._state is not None
        x, mean, square, before, updates, pending = (self._state[name] for name in self.state_names)
        delta = torch.where((before > 0) & (after > 0), before.log() - after.log(), 0)
        z = x.softmax(-1)
        grad = z * (delta - (z * delta).sum(-1, keepdim=True)) + self.gamma * x
        number = updates + 1
        mean = _BETAS[0] * mean + (1 - _BETAS[0]) * grad
        square = _BETAS[1] * square + (1 - _BETAS[1]) * grad.square()
        corrected, corrected_square = (
            average / (1 - beta ** number.double()) for average, beta in zip((mean, square), _BETAS, strict=True)
        )
        x = x - self.lr * corrected / (corrected_square.sqrt() + _EPS)
        self._keep(counts & pending, logits=x, exp_avg=mean, exp_avg_sq=square, updates=number)
