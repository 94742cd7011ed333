# SPDX-License-Identifier: MIT
"""GradNorm: loss weights that equalise training rates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .._checks import check_not_negative, list_of
from .._constant import constant
from ..backends import choose
from ..functional import new_problems
from ._state import read_losses
from ._stateful import StatefulMethod


class GradNorm(StatefulMethod):
    """Loss weights that equalise the training rates (Chen et al., ICML 2018). See :func:`gradsurgery.gradnorm_update`.

    Each step uses the current weights and then updates them, in closed form: no second backward pass. The weights
    start at 1 and sum to T. They are loss weights: they also multiply the gradients of the heads. A step whose norms or
    losses are not finite, or whose losses are negative, does not update them; it uses NaN weights only if a norm is not
    finite. State: the weights, and each task's first loss that is positive and finite, which stands for L(0).

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
    weights_from = "diag G, losses"
    scale = "sums to T"
    state_names = ("weights", "initial_losses")

    def __init__(self, alpha: float = 1.5, lr: float = 0.025, norm_parameters: Iterable[Tensor] | None = None) -> None:
        self.alpha = check_not_negative("alpha", alpha)
        self.lr = check_not_negative("lr", lr)
        given = None if norm_parameters is None else list_of(norm_parameters, "norm_parameters")
        self.gram_parameters = self.norm_parameters = given

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the current weights [..., T] and update them."""
        problems, out = new_problems(gram)
        losses = read_losses(self.name, losses, gram.shape[:-1], gram.device)
        state = self._state_for(losses)
        of_step = (state["weights"], state["initial_losses"])
        choose(backend, gram.device, gram.shape[-1]).gradnorm_step(problems, losses, self.alpha, self.lr, of_step, out)
        self._state = state  # last: a step that raises leaves no new state
        return constant(f"{self.name} weights", out, [gram])

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        # An initial loss that is not finite gives way to the first one that is.
        return {"weights": torch.ones_like(like), "initial_losses": torch.full_like(like, torch.nan)}
