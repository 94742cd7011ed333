# SPDX-License-Identifier: MIT
"""MGDA: the shortest convex combination of the task gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .._extension import NativeSolver
from ..functional import check_solver, min_norm_weights
from ._base import Method, read_losses

_NORMALIZATIONS = ("none", "l2", "loss", "loss+")


class MGDA(Method):
    """Multiple-gradient descent: the shortest convex combination (Sener & Koltun, NeurIPS 2018).

    w = argmin over the simplex of |sum_t w_t g_t / n_t|^2, with n_t = 1 ("none"), |g_t| ("l2"), L_t ("loss") or L_t
    |g_t| ("loss+"). The direction does not conflict with any normalised gradient; it is zero where the gradients are
    Pareto-stationary.

    Conventions: ``combine="original"`` sums the un-normalised gradients, d = sum_t w_t g_t, as the authors' own code
    does; ``combine="normalized"`` sums the rescaled ones, d = sum_t (w_t / n_t) g_t. A task with n_t = 0 is not
    rescaled.
    Scale: w sums to 1 ("original"). No state.

    Args:
        normalization: "none", "l2", "loss" or "loss+"; the last two need losses.
        combine: "original" or "normalized".
        solver, max_iter, tol: as in :func:`gradsurgery.min_norm_weights`.
    """

    name = "mgda"
    scale = "sums to 1"
    non_conflicting = "yes"
    cost = "T^3"

    def __init__(
        self,
        normalization: str = "none",
        combine: str = "original",
        solver: str = "exact",
        max_iter: int = 250,
        tol: float = 1e-6,
    ) -> None:
        if normalization not in _NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(_NORMALIZATIONS)}, got {normalization!r}")
        if combine not in ("original", "normalized"):
            raise ValueError(f'combine must be "original" or "normalized", got {combine!r}')
        self.normalization = normalization
        self.combine = combine
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        check_solver(solver, max_iter, tol)

    @property
    def needs_losses(self) -> bool:  # type: ignore[override]
        """Whether the normalisation divides by losses."""
        return self.normalization in ("loss", "loss+")

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights."""
        scale = self._scale(gram, losses)
        if scale is not None:
            gram = gram / scale[..., :, None] / scale[..., None, :]
        weights = min_norm_weights(gram, solver=self.solver, max_iter=self.max_iter, tol=self.tol, backend=backend)
        return weights / scale if scale is not None and self.combine == "normalized" else weights

    def native_solver(self, device: torch.device) -> NativeSolver | None:
        """Return the solver's options, without normalisation."""
        if self._has_other_weights(MGDA) or self.normalization != "none":
            return None
        return "min_norm", (self.solver == "exact", self.max_iter, self.tol)

    def _scale(self, gram: Tensor, losses: Tensor | None) -> Tensor | None:
        """Return n [..., T], 1 where it would be 0; None without normalisation."""
        if self.normalization == "none":
            return None
        scale = torch.ones_like(gram[..., 0])
        if self.normalization in ("l2", "loss+"):
            scale = scale * gram.diagonal(dim1=-2, dim2=-1).sqrt()
        if self.needs_losses:
            scale = scale * read_losses(self.name, losses, scale.shape, scale.device).to(scale)
        return torch.where(scale == 0, 1, scale)
