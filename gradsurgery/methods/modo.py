# SPDX-License-Identifier: MIT
"""MoDo: double sampling for the weights' step."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_not_negative, check_positive
from ..functional import simplex_steps
from ._simplex import SimplexMethod


class MoDo(SimplexMethod):
    """Multi-objective gradient with double sampling (Chen et al., "Three-Way Trade-Off in Multi-Objective Learning",
    NeurIPS 2023, Algorithm 1).

    w <- P(w - gamma (C w + rho w)), P the projection on the simplex, C = J_1 J_2^T of two independent batches, J_b the
    task gradients of batch b as rows; then d = J_3^T w with a third batch.

    Conventions: rho is from the authors' code; without it (rho = 0) the step is the paper's. With the optimizers, three
    ``collect`` calls and one ``combine`` make a step. With one ``backward`` or ``collect`` only, its batch takes the
    place of all three: C = G, and the step on w is biased. The heads get the mean over the batches. The step depends on
    the gradients' scale, as in the paper.
    Scale: sums to 1. State: w. Cost: O(T^2), and inner products of all pairs of the batches' gradients.

    Args:
        gamma: step on w, > 0.
        rho: pull towards short w, >= 0.
    """

    name = "modo"
    num_batches = 3
    weights_from = "G, of 1 or 3 batches"
    scale = "sums to 1"
    cost = "T^2"

    def __init__(self, gamma: float = 1e-3, rho: float = 0.1) -> None:
        self.gamma = check_positive("gamma", gamma)
        self.rho = check_not_negative("rho", rho)

    def _step(self, gram: Tensor, w: Tensor, backend: str | None) -> Tensor:
        matrix = gram + self.rho * torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
        return simplex_steps(matrix, w, self.gamma, 0.0, 1, backend)
