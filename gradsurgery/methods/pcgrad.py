# SPDX-License-Identifier: MIT
"""PCGrad: projections of conflicting gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_choice
from .._constant import constant
from .._extension import NativeSolver
from ..backends import choose
from ..functional import REDUCTIONS, new_problems
from ._stateful import SteppedMethod


class PCGrad(SteppedMethod):
    """Projecting conflicting gradients (Yu et al., NeurIPS 2020). See :func:`gradsurgery.pcgrad_weights`.

    Scale: a sum over tasks ("mean": an average). For two tasks the direction conflicts with neither. State: ``seed``
    and the step counter, which determine the visiting orders; the counter lives on G's device and is never read on the
    host. Cost: O(T^3).

    Args:
        reduction: "sum" or "mean" over the projected gradients.
        seed: key of the visiting orders; the same on every rank. 0 <= seed < 2^63.
    """

    name = "pcgrad"
    scale = "sum"
    non_conflicting = "if T = 2"
    linear = True
    cost = "T^3"

    def __init__(self, reduction: str = "sum", seed: int = 0) -> None:
        super().__init__(seed)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights and advance the step counter."""
        problems, out = new_problems(gram)
        step, mean = self._step_on(gram.device), self.reduction == "mean"
        choose(backend, gram.device, gram.shape[-1]).pcgrad(problems, None, self.seed, step, True, mean, out)
        return constant(f"{self.name} weights", out, [gram])

    def native_solver(self, device: torch.device, num_tasks: int, *, once: bool = False) -> NativeSolver | None:
        """Return the seed, the step counter (None: step 0) and whether to average."""
        if self._has_other_weights(PCGrad):
            return None
        step = None if once else self._step_on(device)
        return NativeSolver("pcgrad", (self.seed, step, self.reduction == "mean"))
