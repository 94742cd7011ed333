# SPDX-License-Identifier: MIT
"""The compiled backends: thin calls of ``torch.ops.gradsurgery``, or for plain lists of ``_C.Lists``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._compiling import cached
from .._extension import SOLVER_NUMBERS, WHY_NOT, C, NativeSolver, Rule
from .._gradients import TaskGradients

_INFO: dict[str, Any] = C.build_info() if C else {}
if C:
    _OPS = torch.ops.gradsurgery
    # Overloads are resolved once: the lookup costs more than a small operator.
    _GRAM, _GRAM_LIST = _OPS.gram.default, _OPS.gram.list
    _COMBINE, _COMBINE_LIST = _OPS.combine.default, _OPS.combine.list
    _RULE = {"graddrop": _OPS.graddrop.default, "trimmed_mean": _OPS.trimmed_mean.default}
    _RULE_LIST = {"graddrop": _OPS.graddrop.list, "trimmed_mean": _OPS.trimmed_mean.list}
    _TASK_ORDER, _PCGRAD, _MIN_NORM = _OPS.task_order.default, _OPS.pcgrad.default, _OPS.min_norm.default
    _AGGREGATE = {
        "pcgrad": _OPS.aggregate_pcgrad.default,
        "min_norm": _OPS.aggregate_min_norm.default,
        "weights": _OPS.aggregate_weights.default,
    }
    _RANDOM, _SIMPLEX_STEPS = _OPS.random.default, _OPS.simplex_steps.default
    _WEIGHTS, _GRADVAC = _OPS.weights.default, _OPS.gradvac.default
    _GRADNORM, _GRADNORM_STEP = _OPS.gradnorm.default, _OPS.gradnorm_step.default


class CpuBackend:
    """C++ kernels for tensors in host memory."""

    name = "cpu"

    def why_not(self, device: torch.device, num_tasks: int) -> str | None:
        """Return why the extension cannot serve the call; None if it can."""
        if WHY_NOT:
            return WHY_NOT
        if device.type != self.name:
            return f"the tensors are on {device}"
        if num_tasks > _INFO["max_tasks"]:
            return f"it takes at most {_INFO['max_tasks']} tasks, got {num_tasks}"
        return None

    def describe(self) -> str:
        """Return one line on the extension."""
        if WHY_NOT:
            return WHY_NOT
        threads = f"threads: {torch.get_num_threads()}" if _INFO["parallel"] else "threads: 1, compiled without OpenMP"
        return f"available: C++ kernels, {_INFO['isa']}, {threads}"

    def gram(self, grads: TaskGradients, out: Tensor) -> None:
        """Write the Gram matrices."""
        if grads.lists is not None:
            grads.lists.gram(out)
        elif grads.matrix is not None:
            _GRAM(grads.matrix, grads.segments, out)
        else:
            _GRAM_LIST(grads.entries, grads.num_tasks, grads.segments, out)

    def combine(self, grads: TaskGradients, weights: Tensor, out: Tensor | list[Tensor], accumulate: bool) -> None:
        """Write the directions."""
        if grads.lists is not None:
            grads.lists.combine(weights, out, accumulate)
        elif grads.matrix is not None:
            _COMBINE(grads.matrix, weights, grads.segments, accumulate, out)
        else:
            _COMBINE_LIST(grads.entries, weights, grads.segments, accumulate, out)

    def combine_by_rule(self, grads: TaskGradients, rule: Rule, out: Tensor | list[Tensor], accumulate: bool) -> None:
        """Write the direction of a rule."""
        name, arguments = rule
        if grads.lists is not None:
            getattr(grads.lists, f"combine_{name}")(*arguments, out, accumulate)
        elif grads.matrix is not None:
            _RULE[name](grads.matrix, *arguments, accumulate, out)
        else:
            _RULE_LIST[name](grads.entries, grads.num_tasks, *arguments, accumulate, out)

    def task_order(self, seed: int, step: Tensor, out: Tensor) -> None:
        """Write the visiting orders."""
        _TASK_ORDER(out.shape[0], seed, step, out)

    def random(self, gram: Tensor, seed: int, step: Tensor, out: Tensor) -> None:
        """Write random weights, and add 1 to ``step``."""
        _RANDOM(gram, seed, step, out)

    def pcgrad(
        self, gram: Tensor, order: Tensor | None, seed: int, step: Tensor, advance: bool, mean: bool, out: Tensor
    ) -> None:
        """Write PCGrad's weights."""
        _PCGRAD(gram, order, seed, step, advance, mean, out)

    def min_norm(self, gram: Tensor, exact: bool, max_iter: int, tol: float, out: Tensor) -> None:
        """Write the min-norm weights."""
        _MIN_NORM(gram, exact, max_iter, tol, out)

    def weights(
        self, gram: Tensor, solver: str, preference: Tensor | None, parameter: float, limit: float, out: Tensor
    ) -> None:
        """Write the weights of one of ``solvers.SOLVERS``."""
        _WEIGHTS(gram, SOLVER_NUMBERS[solver], preference, parameter, limit, out)

    def simplex_steps(self, matrix: Tensor, lr: float, momentum: float, num_iter: int, weights: Tensor) -> None:
        """Move the weights."""
        _SIMPLEX_STEPS(matrix, lr, momentum, num_iter, weights)

    def gradvac(self, gram: Tensor, order: Tensor, beta: float, targets: Tensor, out: Tensor) -> None:
        """Write Gradient Vaccine's weights, and move its targets."""
        _GRADVAC(gram, order, beta, targets, out)

    def gradnorm(self, inputs: Sequence[Tensor], alpha: float, lr: float, out: Tensor) -> None:
        """Write GradNorm's new weights."""
        _GRADNORM(*inputs, alpha, lr, out)

    def gradnorm_step(
        self, gram: Tensor, losses: Tensor, alpha: float, lr: float, state: tuple[Tensor, Tensor], out: Tensor
    ) -> None:
        """Write the state's weights, and update the state."""
        _GRADNORM_STEP(gram, losses, alpha, lr, *state, out)

    def aggregate(
        self, grads: TaskGradients, solver: NativeSolver, out: Tensor | list[Tensor], accumulate: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """Write the directions; for the list form, return G and the weights."""
        if grads.lists is not None:
            aggregate = getattr(grads.lists, f"aggregate_{solver.name}")
            return aggregate(*solver.arguments, out, accumulate)  # type: ignore[no-any-return]
        _AGGREGATE[solver.name](grads.matrix, grads.segments, *solver.arguments, out)
        return None


class CudaBackend(CpuBackend):
    """CUDA kernels, where the extension was built with them."""

    name = "cuda"

    def why_not(self, device: torch.device, num_tasks: int) -> str | None:
        """Return why the extension cannot serve the call; None if it can."""
        if not WHY_NOT and not _INFO["cuda"]:
            return "the extension was built without CUDA kernels"
        return super().why_not(device, num_tasks) or why_not_gpu(device.index)

    def describe(self) -> str:
        """Return one line on the extension's CUDA kernels."""
        return self.why_not(torch.device("cuda"), 1) or "available: CUDA kernels"


@cached
def why_not_gpu(index: int | None) -> str | None:
    """Return why kernels cannot run on a GPU; None if they can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < (8, 0):
        return f"the GPU must have compute capability 8.0 or later, got {capability}"
    return None
