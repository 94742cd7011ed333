# SPDX-License-Identifier: MIT
"""Launches of the kernels of stage 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..problems import equal_preference
from ..solvers import solve
from . import dual_cone, newton, products, simplex, spectral
from . import gradnorm as gradnorm_kernels
from . import min_norm as min_norm_kernels
from . import pcgrad as pcgrad_kernels
from .launch import on

_SPECTRAL = ("imtl_g", "config", "aligned_mtl_min", "aligned_mtl_median", "aligned_mtl_rmse")
# If one lane fused a product with a sum and another did not, they might decide differently on the same values.
_SOLVER = {"enable_fp_fusion": False}
_PCGRAD_ELEMENTS = 64
# A block has at most 1,024 threads.
_MAX_WARPS = 16 if torch.version.hip else 32


def task_order(seed: int, step: Tensor, out: Tensor) -> None:
    """Write the visiting orders [T, T]."""
    num_tasks = out.shape[0]
    tasks, rows, num_warps = _tile(num_tasks)
    with on(out.device):
        pcgrad_kernels.write_orders[(triton.cdiv(num_tasks, rows),)](
            out, seed, step, num_tasks, TASKS=tasks, ROWS=rows, num_warps=num_warps, **_SOLVER
        )


def pcgrad(gram: Tensor, order: Tensor | None, seed: int, step: Tensor, advance: bool, mean: bool, out: Tensor) -> None:
    """Write PCGrad's weights; with ``advance`` add 1 to ``step``."""
    num_tasks = gram.shape[-1]
    problems = out.numel() // num_tasks
    tasks, rows, num_warps = _tile(num_tasks)
    programs = triton.cdiv(num_tasks, rows)
    parts = out if programs == 1 else out.new_empty(problems, programs, num_tasks)
    if problems:
        with on(gram.device):
            pcgrad_kernels.project[(problems, programs)](
                parts,
                gram,
                gram if order is None else order,
                seed,
                step,
                num_tasks,
                MEAN=mean,
                GIVEN=order is not None,
                TASKS=tasks,
                ROWS=rows,
                num_warps=num_warps,
                **_SOLVER,
            )
    if programs > 1:
        torch.sum(parts, 1, out=out.view(problems, num_tasks))
    if advance:
        step.add_(1)


def min_norm(gram: Tensor, exact: bool, max_iter: int, tol: float, out: Tensor) -> None:
    """Write the min-norm weights."""
    num_tasks = gram.shape[-1]
    problems = out.numel() // num_tasks
    if problems == 0:
        return
    shape = _solver_shape(num_tasks) | _SOLVER
    with on(gram.device):
        if exact:
            min_norm_kernels.exact[(problems,)](out, gram, num_tasks, **shape)
        else:
            min_norm_kernels.frank_wolfe[(problems,)](out, gram, num_tasks, max_iter, tol, **shape)


def random(gram: Tensor, seed: int, step: Tensor, out: Tensor) -> None:
    """Write random weights, and add 1 to ``step``."""
    num_tasks = gram.shape[-1]
    if out.numel():
        with on(gram.device):
            simplex.random[(out.numel() // num_tasks,)](
                out, gram, seed, step, num_tasks, **_solver_shape(num_tasks), **_SOLVER
            )
    step.add_(1)


def simplex_steps(matrix: Tensor, lr: float, momentum: float, num_iter: int, weights: Tensor) -> None:
    """Move weights [..., T] by num_iter steps."""
    num_tasks = weights.shape[-1]
    if weights.numel():
        with on(weights.device):
            simplex.steps[(weights.numel() // num_tasks,)](
                weights, matrix, num_tasks, lr, momentum, num_iter, **_solver_shape(num_tasks), **_SOLVER
            )


def gradnorm(inputs: Sequence[Tensor], alpha: float, lr: float, out: Tensor) -> None:
    """Write GradNorm's new weights from (weights, norms, losses, initial losses)."""
    num_tasks = out.shape[-1]
    if out.numel():
        with on(out.device):
            gradnorm_kernels.update[(out.numel() // num_tasks,)](
                out, *inputs, alpha, lr, num_tasks, TASKS=triton.next_power_of_2(num_tasks), num_warps=1, **_SOLVER
            )


def gradnorm_step(
    gram: Tensor, losses: Tensor, alpha: float, lr: float, state: tuple[Tensor, Tensor], out: Tensor
) -> None:
    """Write the weights of the state (weights, initial losses), and advance the state."""
    num_tasks = out.shape[-1]
    if out.numel():
        with on(out.device):
            gradnorm_kernels.step[(out.numel() // num_tasks,)](
                out,
                gram,
                losses,
                *state,
                alpha,
                lr,
                num_tasks,
                TASKS=triton.next_power_of_2(num_tasks),
                num_warps=1,
                **_SOLVER,
            )


def serves(solver: str, num_tasks: int, device: torch.device) -> bool:
    """Whether ``weights`` has a kernel: Krum has none, and rotations exchange a matrix [T, T] through shared memory."""
    if solver not in _SPECTRAL or device.type == "cpu":
        return solver != "krum"
    reserved = 1024
    shared: int = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - reserved
    return bool(8 * triton.next_power_of_2(num_tasks) ** 2 <= shared)


def weights(gram: Tensor, solver: str, preference: Tensor | None, parameter: float, limit: float, out: Tensor) -> None:
    """Write the weights of a solver of ``solvers.SOLVERS``; NaN where G is not finite."""
    num_tasks = gram.shape[-1]
    problems = out.numel() // num_tasks
    if problems == 0:
        return
    shape = _solver_shape(num_tasks) | _SOLVER
    if solver == "pcd":
        solve(gram, solver, preference, parameter, limit, out, _project_on_cone)
        return
    if preference is None:
        preference = equal_preference(gram, solver)
    with on(gram.device):
        if solver == "upgrad":
            parts = out.new_empty(problems, num_tasks, num_tasks)
            dual_cone.cone_projection[(problems, num_tasks)](
                parts, gram, preference, num_tasks, parameter, ALONE=True, **shape
            )
            torch.sum(parts, 1, out=out.view(problems, num_tasks))
        elif solver == "dualproj":
            dual_cone.cone_projection[(problems, 1)](out, gram, preference, num_tasks, parameter, ALONE=False, **shape)
        elif solver == "cagrad":
            dual_cone.cagrad[(problems,)](out, gram, num_tasks, parameter, **shape)
        elif solver == "fairgrad":
            newton.fairgrad[(problems,)](out, gram, num_tasks, parameter, limit, **shape)
        elif solver in ("imtl_g", "config"):
            config = solver == "config"
            spectral.from_cosines[(problems,)](out, gram, preference, num_tasks, CONFIG=config, **shape)
        else:
            mode = solver.removeprefix("aligned_mtl_")
            spectral.aligned_mtl[(problems,)](out, gram, preference, num_tasks, MODE=mode, **shape)


def _project_on_cone(gram: Tensor, u: Tensor, ridge: float) -> Tensor:
    """Return what ``dual_cone`` does, for one u [1, T]: [B, 1, T]."""
    num_tasks = gram.shape[-1]
    out = gram.new_empty(len(gram), 1, num_tasks)
    with on(gram.device):
        dual_cone.cone_projection[(len(gram), 1)](
            out, gram, u, num_tasks, ridge, ALONE=False, **_solver_shape(num_tasks), **_SOLVER
        )
    return out


def _solver_shape(num_tasks: int) -> dict[str, int]:
    """Return the padded number of tasks and the warps of a program that holds a matrix [T, T]."""
    tasks = triton.next_power_of_2(num_tasks)
    return {"TASKS": tasks, "num_warps": min(max(1, tasks * tasks // 256), _MAX_WARPS)}


def _tile(num_tasks: int) -> tuple[int, int, int]:
    """Return the padded number of tasks, and the rows and warps of a program of PCGrad."""
    tasks = triton.next_power_of_2(num_tasks)
    # Few rows, for many programs; all in the interpreter, which runs programs one after the other.
    rows = tasks if products.INTERPRETED.value else max(1, _PCGRAD_ELEMENTS // tasks)
    return tasks, min(rows, tasks), 1
