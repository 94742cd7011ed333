# SPDX-License-Identifier: MIT
"""Methods whose weights take steps on the simplex."""

from __future__ import annotations

import torch
from torch import Tensor

from .._constant import constant
from ..backends.problems import are_finite
from ..functional import check_gram
from ._stateful import StatefulMethod


class SimplexMethod(StatefulMethod):
    """A method that keeps its weights w [..., T], uniform at first, and takes a step on them at each call.

    Subclasses define ``_step``, which returns the new w. A problem whose G is not finite gets NaN weights and keeps its
    w.
    """

    state_by_problem = True
    state_names = ("weights",)

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights [..., T] for [..., T, T], and take the step."""
        problems = check_gram(gram)
        state = self._state_for(problems[..., 0])
        w = state["weights"]
        moved = self._step(problems, w, backend)
        finite = are_finite(moved)
        weights = torch.where(finite, self._direction(moved), torch.nan)
        w.copy_(torch.where(finite, moved, w))
        self._state = state  # last: a step that raises leaves no new state
        return constant(f"{self.name} weights", weights, [gram])

    def _step(self, gram: Tensor, w: Tensor, backend: str | None) -> Tensor:
        """Return the new w, not finite where G is not."""
        raise NotImplementedError

    def _direction(self, w: Tensor) -> Tensor:
        """Return the weights of d."""
        return w

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        return {"weights": torch.full_like(like, 1 / like.shape[-1])}
