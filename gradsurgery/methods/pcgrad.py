# SPDX-License-Identifier: MIT
"""PCGrad: projections of conflicting gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._extension import NativeSolver
from ..functional import _check_seed, pcgrad_step
from ._base import Method, check_not_capturing


class PCGrad(Method):
    """Projecting conflicting gradients (Yu et al., NeurIPS 2020). See :func:`gradsurgery.pcgrad_weights`.

    Scale: a sum over tasks ("mean": an average). For two tasks the direction conflicts with neither. State: the step
    counter, which with ``seed`` determines the visiting orders; it lives on G's device and is never read on the host.

    Args:
        reduction: "sum" or "mean" over the projected gradients.
        seed: key of the visiting orders; the same on every rank.
    """

    name = "pcgrad"

    def __init__(self, reduction: str = "sum", seed: int = 0) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}')
        self.reduction = reduction
        self.seed = _check_seed(seed)
        self._step: Tensor | None = None

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights and advance the step counter."""
        return pcgrad_step(gram, self._step_on(gram.device), self.seed, self.reduction, backend)

    def native_solver(self, device: torch.device) -> NativeSolver | None:
        """Return the seed, the step counter and whether to average."""
        if self._has_other_weights(PCGrad):
            return None
        return "pcgrad", (self.seed, self._step_on(device), self.reduction == "mean")

    def _step_on(self, device: torch.device) -> Tensor:
        if self._step is None:
            check_not_capturing(self.name, device)
            # Made where G lives: a copy from the host would synchronise.
            self._step = torch.zeros((), dtype=torch.int64, device=device)
        elif self._step.device != device:
            self._step = self._step.to(device)
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """Return the seed and the step counter."""
        step = torch.zeros((), dtype=torch.int64) if self._step is None else self._step.clone()
        return {"seed": self.seed, "step": step}

    def _restore(self, state: dict[str, Any]) -> None:
        seed, step = _check_seed(state["seed"]), state["step"]
        if not isinstance(step, Tensor) or step.dtype != torch.int64 or step.dim() != 0:
            raise ValueError(f"step must be an int64 tensor [], got {step!r}")
        self.seed = seed
        if self._step is None:
            self._step = step.clone()
        else:
            self._step.copy_(step)  # in place: a captured graph goes on from there
