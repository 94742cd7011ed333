# SPDX-License-Identifier: MIT
"""CR-MOGM: another method's weights, averaged over the steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_fraction, describe
from .._constant import constant
from ..backends.problems import are_finite
from ..functional import check_gram
from ._base import Method, weigh
from ._buffered import BufferedMethod
from ._coordinate import CoordinateMethod
from ._stateful import StatefulMethod


class CRMOGM(StatefulMethod):
    """Correlation-reduced multi-objective gradient manipulation (Zhou et al., NeurIPS 2022, Algorithm 1).

    w_k = alpha w_{k-1} + (1 - alpha) v_k with the weights v_k of another method at step k, so that the weights depend
    less on the batch that they weigh. w_1 = v_1.

    Conventions: a step whose v is not finite has weights that are not finite, either, and does not enter the average.
    CR-MOGM needs losses, and weights heads, if the other method does.
    Scale: the other method's. State: w, and the other method's. Cost: the other method's.

    Args:
        method: a name of ``methods.available()``, or a ``Method``; its weights must come from G or losses.
            ``aggregate`` has an argument ``method`` itself: to choose the other method there, pass a ``CRMOGM``.
        alpha: 0 <= alpha <= 1.
        method_options: the named method's options. If it has an option ``alpha`` of its own, pass a ``Method``.
    """

    name = "cr_mogm"
    state_by_problem = True
    state_names = ("weights",)
    scale = "the other method's"
    cost = "the other method's"

    def __init__(self, method: str | Method = "mgda", alpha: float = 0.9, **method_options: Any) -> None:
        from . import resolve

        self.method = resolve(method, method_options)
        if isinstance(self.method, (BufferedMethod, CoordinateMethod)):
            raise ValueError(f"method must have weights from G or losses alone, got {self.method.name!r}")
        self.alpha = check_fraction("alpha", alpha)
        self.needs_losses = self.method.needs_losses
        self.needs_gram = self.method.needs_gram
        self.weights_losses = self.method.weights_losses
        self.num_batches = self.method.num_batches
        self.gram_parameters = self.method.gram_parameters

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the average [..., T], after it has taken in the other method's weights."""
        problems = check_gram(gram)
        state = self._state_for(problems[..., 0])
        w = state["weights"]
        new = weigh(self.method, problems, losses, backend)
        averaged = torch.where(w.isnan(), new, self.alpha * w + (1 - self.alpha) * new)
        finite = are_finite(new)
        w.copy_(torch.where(finite, averaged, w))
        self._state = state  # last: a step that raises leaves no new state
        return constant(f"{self.name} weights", averaged, [gram])

    def _check_fits(self, num_tasks: int) -> None:
        from . import is_known

        if is_known(self.method):
            self.method._check_fits(num_tasks)

    @property
    def seed(self) -> int:
        """The other method's ``seed``; AttributeError if it has none."""
        return self.method.seed  # type: ignore[attr-defined,no-any-return]

    @property
    def update(self) -> Any:
        """The other method's ``update``; AttributeError if it has none."""
        return self.method.update  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Return the average (None before the first step), and the other method's state."""
        return {**super().state_dict(), "method": self.method.state_dict()}

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        return {"weights": torch.full_like(like, torch.nan)}

    def _restore(self, state: dict[str, Any]) -> None:
        weights = self._checked(state)
        if not isinstance(state["method"], dict):
            raise ValueError(f"method must be the other method's state, a dict, got {describe(state['method'])}")
        self.method.load_state_dict(state["method"])
        self._take_over(weights)
