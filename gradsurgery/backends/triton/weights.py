# SPDX-License-Identifier: MIT
"""Launches of the solvers of ``solvers.WEIGHTINGS``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import dual_cone, newton, spectral
from .launch import SOLVER, on, solver_shape

SPECTRAL = ("imtl_g", "config", "aligned_mtl_min", "aligned_mtl_median", "aligned_mtl_rmse")


def serves(method: str, num_tasks: int, device: torch.device) -> bool:
    """Whether there is a kernel: Krum has none, and rotations exchange a matrix [T, T] through shared memory."""
    if method not in SPECTRAL or device.type == "cpu":
        return method != "krum"
    reserved = 1024
    shared: int = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - reserved
    return bool(8 * triton.next_power_of_2(num_tasks) ** 2 <= shared)


def weights(gram: Tensor, method: str, preference: Tensor | None, parameter: float, limit: float, out: Tensor) -> None:
    """Write the weights for G [..., T, T]; NaN where it is not finite."""
    num_tasks = gram.shape[-1]
    problems = out.numel() // num_tasks
    if problems == 0:
        return
    shape = solver_shape(num_tasks) | SOLVER
    if preference is None:
        preference = gram.new_full((num_tasks,), 1 if method == "config" else 1 / num_tasks)
    with on(gram.device):
        if method == "upgrad":
            parts = out.new_empty(problems, num_tasks, num_tasks)
            dual_cone.cone_projection[(problems, num_tasks)](
                parts, gram, preference, num_tasks, parameter, ALONE=True, **shape
            )
            torch.sum(parts, 1, out=out.view(problems, num_tasks))
        elif method == "dualproj":
            dual_cone.cone_projection[(problems, 1)](out, gram, preference, num_tasks, parameter, ALONE=False, **shape)
        elif method == "cagrad":
            dual_cone.cagrad[(problems,)](out, gram, num_tasks, parameter, **shape)
        elif method == "fairgrad":
            newton.fairgrad[(problems,)](out, gram, num_tasks, parameter, limit, **shape)
        elif method in ("imtl_g", "config"):
            config = method == "config"
            spectral.from_cosines[(problems,)](out, gram, preference, num_tasks, CONFIG=config, **shape)
        else:
            mode = method.removeprefix("aligned_mtl_")
            spectral.aligned_mtl[(problems,)](out, gram, preference, num_tasks, MODE=mode, **shape)
