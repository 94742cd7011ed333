# SPDX-License-Identifier: MIT
"""GradNorm: loss weights that equalise training rates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._checks import check_not_negative, describe, list_of
from .._constant import constant
from ..backends import choose
from ..functional import new_problems
from ._base import Method
from ._state import check_state, read_losses, state_on, taken_over


class GradNorm(Method):
    """Loss weights that equalise the training rates (Chen et al., ICML 2018). See :func:`gradsurgery.gradnorm_update`.

    Each step uses the current weights and then updates them, in closed form: no second backward pass. The weights
    start at 1 and sum to T. They are loss weights: they also multiply the gradients of the heads. A step whose norms or
    losses are not finite, or whose losses are negative, leaves them as they are, and has NaN weights only for such
    norms. State: the weights, and each task's first loss that is positive and finite, which stands for L(0).

    Args:
        alpha: restoring force, >= 0; 0 equalises the gradient norms.
        lr: step on the weights, >= 0.
        norm_parameters: the parameters over which the norms are taken (the paper: the last shared layer); default
            all shared parameters. Read by the optimizers; ``weights`` itself takes the norms from the G that it is
            given.
    """

    name = "gradnorm"
    needs_losses = True
    weights_losses = True
    needs = "diag G, losses"
    scale = "sums to T"

    def __init__(self, alpha: float = 1.5, lr: float = 0.025, norm_parameters: Iterable[Tensor] | None = None) -> None:
        self.alpha = check_not_negative("alpha", alpha)
        self.lr = check_not_negative("lr", lr)
        given = None if norm_parameters is None else list_of(norm_parameters, "norm_parameters")
        self.gram_parameters = self.norm_parameters = given
        self._weights: Tensor | None = None
        self._initial_losses: Tensor | None = None

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the current weights [..., T] and update them."""
        problems, out = new_problems(gram)
        shape = gram.shape[:-1]
        losses = read_losses(self.name, losses, shape, gram.device)
        state = (
            state_on(self.name, self._weights, shape, 1.0, gram.device),
            # An initial loss that is not finite gives way to the first one that is.
            state_on(self.name, self._initial_losses, shape, torch.nan, gram.device),
        )
        choose(backend, gram.device, shape[-1]).gradnorm_step(problems, losses, self.alpha, self.lr, state, out)
        self._weights, self._initial_losses = state  # last: a step that raised has not begun
        return constant(f"{self.name} weights", out, [gram])

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the initial losses; None before the first step."""
        state = {"weights": self._weights, "initial_losses": self._initial_losses}
        return {name: None if value is None else value.clone() for name, value in state.items()}

    def _restore(self, state: dict[str, Any]) -> None:
        weights, initial_losses = (check_state(name, state[name]) for name in ("weights", "initial_losses"))
        if getattr(weights, "shape", None) != getattr(initial_losses, "shape", None):
            raise ValueError(
                f"weights and initial_losses must be of one shape, got {describe(weights)} and "
                f"{describe(initial_losses)}"
            )
        self._weights = taken_over(self._weights, weights)
        self._initial_losses = taken_over(self._initial_losses, initial_losses)
