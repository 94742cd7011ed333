# SPDX-License-Identifier: MIT
"""Methods that need the gradients themselves, not only their products."""

from __future__ import annotations

import torch
from torch import Tensor

from .._extension import Rule
from ._base import Method


class CoordinateMethod(Method):
    """A method that computes each coordinate of d from that coordinate of the T gradients, in place of stages 2 to 4.

    Segments do not matter: the coordinates do not depend on each other. A coordinate of d is NaN if any gradient is not
    finite there.
    """

    weights_from = "gradients"

    def rule(self, device: torch.device, num_tasks: int) -> Rule:
        """Return the rule for T gradients on that device; the backend that applies it advances the state."""
        raise NotImplementedError

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Raise ValueError: there are none."""
        raise ValueError(
            f"method {self.name!r} has no weights, because it works on the gradients coordinate by coordinate: use "
            "gradsurgery.aggregate or SurgeryOptimizer"
        )
