# SPDX-License-Identifier: MIT
"""Stage 2: the Gram matrix of the task gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._constant import constant
from ._gradients import Grads, TaskGradients, parse
from .backends import Backend, choose


def gram(grads: Grads, *, segments: Sequence[int] | None = None, backend: str | None = None) -> Tensor:
    """Return the inner products of the task gradients, G_ij = g_i . g_j.

    Args:
        grads: a tensor [T, N] with a contiguous last dimension (the flat form), or a list of T lists of P tensors (the
            list form), read in place; None where a task has no gradient. float64, float32, bfloat16 or float16, one
            dtype per parameter.
        segments: blocks of parameters that get a Gram matrix each: ascending offsets [0, .., N] for the flat form, one
            segment id >= 0 per parameter for the list form.
        backend: a name of :func:`gradsurgery.backends`; None chooses.

    Returns:
        float64 [T, T], exactly symmetric; [S, T, T] with ``segments``. A constant to autograd.
        |G_ij - exact| <= 1e-6 |g_i| |g_j| (1e-13 for float64 gradients).

    Raises:
        ValueError: shapes, devices or segments do not fit together.
        TypeError: an entry is not a dense real tensor of one of the dtypes.
        RuntimeError: the named backend cannot serve the call.

    Cost: one read of the gradients, T (T + 1) / 2 multiply-adds per column. Host synchronisations: none.
    """
    parsed = parse(grads, segments)
    chosen = choose(backend, parsed.device, parsed.num_tasks)
    return constant("gram", gram_of(parsed, chosen), parsed.differentiable)


def gram_of(grads: TaskGradients, backend: Backend) -> Tensor:
    """Return the Gram matrices of checked gradients, [S, T, T] where they are segmented, else [T, T]."""
    out = torch.empty(_shape(grads), dtype=torch.float64, device=grads.device)
    backend.gram(grads, out)
    return out


def zeros_for(grads: TaskGradients) -> Tensor:
    """Return zeros of the shape of :func:`gram_of`, for methods that do not need G."""
    return torch.zeros((), dtype=torch.float64, device=grads.device).expand(_shape(grads))


def _shape(grads: TaskGradients) -> tuple[int, ...]:
    tasks = grads.num_tasks
    return (grads.num_segments, tasks, tasks) if grads.segmented else (tasks, tasks)
