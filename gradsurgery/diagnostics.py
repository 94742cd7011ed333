# SPDX-License-Identifier: MIT
"""What follows from G: norms, cosines, conflicts."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .backends.problems import squared_length

_FIELDS = ("gram", "weights", "norms", "cosines", "conflicts", "magnitude_similarity", "update_norm", "finite")


class NotComputedError(ValueError, AttributeError):
    """The step did not compute this value; ``hasattr`` is False for it, too."""


class SurgeryInfo:
    """The Gram matrix and weights of one step, and what follows from them.

    Values are tensors on the gradients' device, computed when they are asked for; only :meth:`to_dict` synchronises
    with the host. Shapes are given for granularity "global"; the others add a leading dimension, one entry for each
    segment. (If nothing is shared there is a single segment, with a G of zeros.) With a gradient scaler, values are
    unscaled. For methods that keep averages in place of the task gradients ("moco", "db_mtl", "m_config"), G, the
    weights and what follows from them are those of these averages, and ``update_norm`` of "m_config" is not |d|.

    Attributes:
        tasks: the tasks' names, or their indices as strings.
        segments: for each segment, the place of its group in ``param_groups`` ("per_group"), or its parameter
            ("per_tensor"); empty if nothing is shared, None for granularity "global".
    """

    def __init__(
        self, tasks: list[str], gram: Tensor | None, weights: Tensor | None, segments: list[Any] | None = None
    ) -> None:
        self.tasks = tasks
        self.segments = segments
        self._gram = gram
        self._weights = weights

    def __repr__(self) -> str:
        there = [name for name, value in (("gram", self._gram), ("weights", self._weights)) if value is not None]
        return f"SurgeryInfo(tasks={self.tasks}, with {' and '.join(there) or 'neither gram nor weights'})"

    @property
    def gram(self) -> Tensor:
        """Inner products of the task gradients over the shared parameters, float64 [T, T].

        With mode="representation" these are products of the features' gradients, and all that follows from G is, too.

        Raises NotComputedError, a ValueError, if the step computed no G: coordinate-wise methods compute none, nor does
        ``backward`` where it takes a single pass, for methods that do not need G.
        """
        if self._gram is None:
            raise NotComputedError(
                "this step computed no G: its method works coordinate by coordinate, or its weights do not need G "
                "(collect() and combine() compute G for such a method)"
            )
        return self._gram

    @property
    def weights(self) -> Tensor:
        """The weights of d = sum_t w_t g_t, float64 [T]; coordinate-wise methods have none (NotComputedError)."""
        if self._weights is None:
            raise NotComputedError("a coordinate-wise method has no weights")
        return self._weights

    @property
    def norms(self) -> Tensor:
        """|g_t|, [T]."""
        return self.gram.diagonal(dim1=-2, dim2=-1).sqrt()

    @property
    def cosines(self) -> Tensor:
        """g_i . g_j / (|g_i| |g_j|), [T, T]; 0 where either gradient is zero."""
        norms = self.norms
        product = norms[..., :, None] * norms[..., None, :]
        return torch.where(product == 0, 0, self.gram / product)

    @property
    def conflicts(self) -> Tensor:
        """The fraction of the T (T - 1) / 2 pairs with a negative cosine, float64 []; NaN where G is not finite."""
        num_tasks = len(self.tasks)
        count = self.gram.triu(1).lt(0).sum((-2, -1), dtype=torch.float64)
        return torch.where(self.finite, count / max(1, num_tasks * (num_tasks - 1) // 2), torch.nan)

    @property
    def magnitude_similarity(self) -> Tensor:
        """2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2), [T, T] (Yu et al. 2020, definition 2); 1 between zero gradients."""
        norms = self.norms
        squares = norms.square()
        total = squares[..., :, None] + squares[..., None, :]
        return torch.where(total == 0, 1, 2 * norms[..., :, None] * norms[..., None, :] / total)

    @property
    def update_norm(self) -> Tensor:
        """|d| = sqrt(w^T G w) over the shared parameters, []."""
        return squared_length(self.gram, self.weights).squeeze(-1).sqrt()

    @property
    def finite(self) -> Tensor:
        """Whether G is finite, []; it is if the task gradients of the shared parameters are."""
        return self.gram.isfinite().all(-1).all(-1)

    def to_dict(self) -> dict[str, Any]:
        """Return tasks and tensors as Python numbers and nested lists, by one copy to the host.

        None stands for what the step did not compute. ``segments``, which may hold parameters, is left out.
        """
        result: dict[str, Any] = {"tasks": self.tasks, **dict.fromkeys(_FIELDS)}
        values: dict[str, Tensor] = {}
        for name in _FIELDS:
            with suppress(NotComputedError):
                values[name] = getattr(self, name)
        if values:
            host = torch.cat([value.double().reshape(-1) for value in values.values()]).cpu()
            parts = host.split([value.numel() for value in values.values()])
            for (name, value), part in zip(values.items(), parts, strict=True):
                result[name] = part.to(value.dtype).reshape(value.shape).tolist()
        return result
