# SPDX-License-Identifier: MIT
"""MGDA: the shortest convex combination of the task gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_choice
from .._constant import constant
from .._extension import NativeSolver
from ..functional import check_gram, check_solver, min_norm_weights
from ._base import Method
from ._state import read_losses


class MGDA(Method):
    """Multiple-gradient descent: the shortest convex combination (Sener & Koltun, NeurIPS 2018).

    w = argmin over the simplex of |sum_t w_t g_t / n_t|^2, with n_t = 1 ("none"), |g_t| ("l2"), L_t ("loss") or L_t
    |g_t| ("loss+"). sum_t (w_t / n_t) g_t conflicts with no task; it is zero where the gradients are Pareto-stationary.

    Conventions: ``combine="original"`` sums the un-normalised gradients, d = sum_t w_t g_t, as the authors' own code
    does; this d may conflict with some tasks. ``combine="normalized"`` sums the rescaled gradients, d = sum_t (w_t /
    n_t) g_t, as LibMTL does. A task with n_t = 0 is not rescaled; a negative loss makes the weights NaN.
    Scale: w sums to 1 ("original"). No state. Cost: O(T^3) typically.

    Args:
        normalization: "none", "l2", "loss" or "loss+"; the last two need losses.
        combine: "original" or "normalized".
        solver, max_iter, tol: as in :func:`gradsurgery.min_norm_weights`.
    """

    name = "mgda"
    scale = "sums to 1"
    non_conflicting = 'if normalization="none" or combine="normalized"'
    cost = "T^3"

    def __init__(
        self,
        normalization: str = "none",
        combine: str = "original",
        solver: str = "exact",
        max_iter: int = 250,
        tol: float = 1e-6,
    ) -> None:
        self.normalization = check_choice("normalization", normalization, ("none", "l2", "loss", "loss+"))
        self.needs_losses = normalization in ("loss", "loss+")
        self.combine = check_choice("combine", combine, ("original", "normalized"))
        self.solver = solver
        self.max_iter, self.tol = check_solver(solver, max_iter, tol)

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights."""
        if self.normalization == "none":
            return self._shortest(gram, backend)
        problems = check_gram(gram)
        scale = self._scale(problems, losses)
        weights = self._shortest(problems / scale[..., :, None] / scale[..., None, :], backend)
        weights = weights / scale if self.combine == "normalized" else weights
        return constant(f"{self.name} weights", weights, [gram])

    def _shortest(self, gram: Tensor, backend: str | None) -> Tensor:
        return min_norm_weights(gram, solver=self.solver, max_iter=self.max_iter, tol=self.tol, backend=backend)

    def native_solver(self, device: torch.device, num_tasks: int, *, once: bool = False) -> NativeSolver | None:
        """Return the solver's options, without normalisation."""
        if self._has_other_weights(MGDA) or self.normalization != "none":
            return None
        return NativeSolver("min_norm", (self.solver == "exact", self.max_iter, self.tol))

    def _scale(self, gram: Tensor, losses: Tensor | None) -> Tensor:
        """Return n [..., T], 1 where it would be 0."""
        scale = torch.ones_like(gram[..., 0])
        if self.normalization in ("l2", "loss+"):
            scale = scale * gram.diagonal(dim1=-2, dim2=-1).sqrt()
        if self.needs_losses:
            scale = scale * read_losses(self.name, losses, scale.shape, scale.device)
        scale = torch.where(scale.isfinite() & (scale >= 0), scale, torch.nan)
        return torch.where(scale == 0, 1, scale)
