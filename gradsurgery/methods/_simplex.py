# SPDX-License-Identifier: MIT
"""Projection on the simplex, and methods whose weights take steps on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._gradients import describe
from ..functional import check_gram
from ._base import Method, state_on, taken_over


def project_on_simplex(x: Tensor) -> Tensor:
    """Return argmin |w - x| with w >= 0 and sum(w) = 1, for x [..., T] (Held, Wolfe & Crowder 1974)."""
    x = x - x.amax(-1, keepdim=True)  # or large entries would swallow the 1
    number = torch.arange(1, x.shape[-1] + 1, device=x.device)
    descending = x.sort(-1, descending=True).values
    shift = (descending.cumsum(-1) - 1) / number
    positive = (descending > shift).sum(-1, keepdim=True).clamp(min=1)
    return (x - shift.gather(-1, positive - 1)).clamp(min=0)


class SimplexMethod(Method):
    """A method that keeps its weights w [..., T], uniform at first, and takes a step on them at each call.

    Subclasses say in ``_step`` what w becomes. A problem whose G is not finite gets NaN weights and keeps its w.
    """

    state_by_problem = True

    _w: Tensor | None = None

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights [..., T] for [..., T, T], and take the step."""
        gram = check_gram(gram)
        w = state_on(self.name, self._w, gram.shape[:-1], 1 / gram.shape[-1], gram.device)
        finite = gram.isfinite().all(-1).all(-1)[..., None]
        moved = self._step(gram, w)
        weights = torch.where(finite, self._direction(moved), torch.nan)
        w.copy_(torch.where(finite, moved, w))
        self._w = w  # last: a step that raised has not begun
        return weights

    def _step(self, gram: Tensor, w: Tensor) -> Tensor:
        """Return the new w."""
        raise NotImplementedError

    def _direction(self, w: Tensor) -> Tensor:
        """Return the weights of d."""
        return w

    def state_dict(self) -> dict[str, Any]:
        """Return w; None before the first step."""
        return {"weights": None if self._w is None else self._w.clone()}

    def _restore(self, state: dict[str, Any]) -> None:
        weights = state["weights"]
        if weights is not None and (not isinstance(weights, Tensor) or weights.dim() == 0):
            raise ValueError(f"weights must be a tensor [..., T], got {describe(weights)}")
        self._w = taken_over(self._w, weights)
