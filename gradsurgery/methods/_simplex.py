# SPDX-License-Identifier: MIT
"""Methods whose weights take steps on the simplex."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._constant import constant
from ..backends.problems import are_finite
from ..functional import check_gram
from ._base import Method
from ._state import check_state, state_on, taken_over


class SimplexMethod(Method):
    """A method that keeps its weights w [..., T], uniform at first, and takes a step on them at each call.

    Subclasses say in ``_step`` what w becomes. A problem whose G is not finite gets NaN weights and keeps its w.
    """

    state_by_problem = True

    _w: Tensor | None = None

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights [..., T] for [..., T, T], and take the step."""
        problems = check_gram(gram)
        w = state_on(self.name, self._w, gram.shape[:-1], 1 / gram.shape[-1], gram.device)
        moved = self._step(problems, w, backend)
        finite = are_finite(moved)
        weights = torch.where(finite, self._direction(moved), torch.nan)
        w.copy_(torch.where(finite, moved, w))
        self._w = w  # last: a step that raised has not begun
        return constant(f"{self.name} weights", weights, [gram])

    def _step(self, gram: Tensor, w: Tensor, backend: str | None) -> Tensor:
        """Return the new w, not finite where G is not."""
        raise NotImplementedError

    def _direction(self, w: Tensor) -> Tensor:
        """Return the weights of d."""
        return w

    def state_dict(self) -> dict[str, Any]:
        """Return w; None before the first step."""
        return {"weights": None if self._w is None else self._w.clone()}

    def _restore(self, state: dict[str, Any]) -> None:
        self._w = taken_over(self._w, check_state("weights", state["weights"]))
