# SPDX-License-Identifier: MIT
"""Stage 3 as functions of G."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_choice, check_count, check_not_negative, check_word, describe
from ._compiling import is_traced
from ._constant import constant
from ._gradients import as_float64
from .backends import choose

REDUCTIONS = ("sum", "mean")


def task_order(
    num_tasks: int,
    *,
    seed: int,
    step: int | Tensor,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return PCGrad's visiting orders: row i is a uniform random permutation of 0..T-1.

    A pure function of (seed, step, i): Fisher-Yates (k = T-1 .. 1 swaps positions k and floor(u (k+1) / 2^32)) with
    the words u of Philox4x32-10 (Salmon et al., SC 2011), key ``seed``, counter (step, i, block). The same on every
    backend and rank; no global generator is read.

    Args:
        num_tasks: T >= 1.
        seed: 0 <= seed < 2^63.
        step: 0 <= step < 2^63, or an int64 tensor of one element, which is not read on the host.
        device: where the result lives; default the step's device, else the CPU.
        backend: a name of :func:`gradsurgery.backends`; None chooses.

    Returns:
        int64 [T, T]. Row i holds i itself, which PCGrad skips.

    Raises:
        ValueError: ``num_tasks``, ``seed`` or ``step`` is out of its range.
        RuntimeError: the named backend cannot serve the call.
    """
    check_count("num_tasks", num_tasks)
    if device is None:
        device = step.device if isinstance(step, Tensor) else "cpu"
    order = torch.empty(num_tasks, num_tasks, dtype=torch.int64, device=device)
    seed, count = check_word("seed", seed), _step_tensor(step, order.device)
    choose(backend, order.device, num_tasks).task_order(seed, count, order)
    return order


def pcgrad_weights(
    gram: Tensor,
    *,
    order: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    reduction: str = "sum",
    backend: str | None = None,
) -> Tensor:
    """Return PCGrad's weights.

    For each task i the running vector p starts at g_i. It visits every j != i in a random order and, where p . g_j <
    0, becomes p - (p . g_j / |g_j|^2) g_j with the original g_j. Then d = sum_i p_i (or the mean), and w are its
    coefficients: d = sum_t w_t g_t.

    Conventions: strict inequality, no epsilon; j = i is skipped; a zero g_j is never projected on; every problem of
    a batch uses the same order.

    Args:
        gram: [..., T, T].
        order: int64 [T, T] visiting orders, each row a permutation of 0..T-1; default ``task_order(T, seed, step)``.
        seed, step: as in :func:`task_order`.
        reduction: "sum" or "mean" over i.
        backend: a name of :func:`gradsurgery.backends`; None chooses.

    Returns:
        float64 [..., T]; NaN where G is not finite. A constant to autograd.

    Raises:
        ValueError: G or ``order`` has another shape or device, or an option is out of its range. On a GPU the
            contents of ``order`` are not validated.
        TypeError: G is not floating point, or ``order`` not int64.
        RuntimeError: the named backend cannot serve the call.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1. Cost: O(T^3).
    """
    check_choice("reduction", reduction, REDUCTIONS)
    problems, out = new_problems(gram)
    if order is not None:
        order = _check_order(order, gram.shape[-1], gram.device)
    seed, count = check_word("seed", seed), _step_tensor(step, gram.device)
    choose(backend, gram.device, gram.shape[-1]).pcgrad(problems, order, seed, count, False, reduction == "mean", out)
    return constant("pcgrad_weights", out, [gram])


def min_norm_weights(
    gram: Tensor, *, solver: str = "exact", max_iter: int = 250, tol: float = 1e-6, backend: str | None = None
) -> Tensor:
    """Return the weights of the shortest convex combination: argmin of w^T G w, w >= 0, sum(w) = 1.

    ``solver="exact"`` is Wolfe's active-set method: exact to rounding, after at most 8 T + 32 steps and T + 1
    factorizations. ``solver="frank_wolfe"`` starts at w = 1 / T and steps towards the task with the least (G w)_t (the
    first of equals) until the step is below ``tol``, at most ``max_iter`` times. It is there for comparison; for
    T >= 16 it often stops far from the optimum.

    Args:
        gram: [..., T, T].
        solver: "exact" or "frank_wolfe".
        max_iter: >= 1, iterations of Frank-Wolfe.
        tol: >= 0 and finite; Frank-Wolfe ends when its step is below this.
        backend: a name of :func:`gradsurgery.backends`; None chooses.

    Returns:
        float64 [..., T] on the simplex; NaN where G is not finite. A constant to autograd. If several weights give the
        shortest combination (dependent gradients), one of them is returned.

    Raises:
        ValueError: G has another shape, or an option is out of its range.
        TypeError: G is not floating point.
        RuntimeError: the named backend cannot serve the call.

    Source: P. Wolfe, "Finding the nearest point in a polytope", 1976; Sener & Koltun, "Multi-Task Learning as
    Multi-Objective Optimization", NeurIPS 2018, equation 4 and Algorithm 2. Cost: O(T^3) typically.
    """
    max_iter, tol = check_solver(solver, max_iter, tol)
    problems, out = new_problems(gram)
    choose(backend, gram.device, gram.shape[-1]).min_norm(problems, solver == "exact", max_iter, tol, out)
    return constant("min_norm_weights", out, [gram])


def gradnorm_update(
    weights: Tensor,
    norms: Tensor,
    losses: Tensor,
    initial_losses: Tensor,
    *,
    alpha: float = 1.5,
    lr: float = 0.025,
    backend: str | None = None,
) -> Tensor:
    """Return the task weights after one GradNorm step.

    With n_i = |grad L_i|, G_i = w_i n_i and r_i = (L_i / L_i(0)) / mean_k (L_k / L_k(0)), the loss
    sum_i |G_i - target_i|, where target_i = mean(G) r_i^alpha is held constant, has the derivative
    sign(G_i - target_i) n_i with respect to w_i. The weights take one step of gradient descent on this loss, and are
    then scaled to sum to T.

    Conventions: plain gradient descent on w; a weight stops at 0; if all would reach 0 they stay as they were; the
    target's mean is over all tasks. The step depends on the scale of the gradients, as in the paper.

    Args:
        weights, norms, losses, initial_losses: [..., T] each, of any floating dtype; finite, initial losses > 0, the
            others >= 0. That is not checked: other values give some result, such as NaN.
        alpha: restoring force, >= 0; 0 equalises the norms.
        lr: step on w, >= 0.
        backend: a name of :func:`gradsurgery.backends`; None chooses.

    Returns:
        float64 [..., T], sum T. A constant to autograd.

    Raises:
        ValueError: shapes or devices differ, or an option is out of its range.
        TypeError: a tensor is not floating point.
        RuntimeError: the named backend cannot serve the call.

    Source: Chen et al., "GradNorm", ICML 2018, equations 1 and 2, Algorithm 1. Cost: O(T), no second backward pass.
    """
    values = {"weights": weights, "norms": norms, "losses": losses, "initial_losses": initial_losses}
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.shape[-1:] in ((), (0,)) or value.shape != weights.shape:
            raise ValueError(f"{name} must have the shape [..., T] of weights, T >= 1, got {describe(value)}")
        if value.device != weights.device:
            raise ValueError(f"{name} must be on {weights.device} like weights, got {value.device}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a real floating-point tensor, got {value.dtype}")
    alpha, lr = check_not_negative("alpha", alpha), check_not_negative("lr", lr)
    inputs = [as_float64(value) for value in values.values()]
    out = torch.empty_like(inputs[0])
    choose(backend, weights.device, weights.shape[-1]).gradnorm(inputs, alpha, lr, out)
    return constant("gradnorm_update", out, list(values.values()))


def simplex_steps(
    matrix: Tensor, weights: Tensor, lr: float, momentum: float, num_iter: int, backend: str | None
) -> Tensor:
    """Return weights [..., T] after projected gradient steps on the simplex, by matrices A [..., T, T].

    ``num_iter`` times v = momentum v + A w and w = P(w - lr v), P the projection on the simplex and v = 0 at first; A
    need not be symmetric. NaN where it is not finite.
    """
    matrix, moved = as_float64(matrix), weights.clone(memory_format=torch.contiguous_format)
    choose(backend, matrix.device, matrix.shape[-1]).simplex_steps(matrix, lr, momentum, num_iter, moved)
    return moved


def new_problems(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return G as contiguous float64, and new weights to fill in; TypeError or ValueError unless G is [..., T, T]."""
    gram = check_gram(gram)
    return gram, gram.new_empty(gram.shape[:-1])


def check_gram(gram: Tensor) -> Tensor:
    """Return G as contiguous float64, detached; TypeError or ValueError unless it is [..., T, T]."""
    if not isinstance(gram, Tensor) or not gram.is_floating_point():
        raise TypeError(f"gram must be a real floating-point tensor, got {describe(gram)}")
    shape = gram.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == 0:
        raise ValueError(f"gram must be [..., T, T] with T >= 1, got shape {tuple(shape)}")
    return as_float64(gram)


def _check_order(order: Tensor, num_tasks: int, device: torch.device) -> Tensor:
    if not isinstance(order, Tensor) or order.dtype != torch.int64:
        raise TypeError(f"order must be an int64 tensor, got {describe(order)}")
    if order.shape != (num_tasks, num_tasks):
        raise ValueError(f"order must be [T, T] = [{num_tasks}, {num_tasks}], got shape {tuple(order.shape)}")
    if order.device != device:
        raise ValueError(f"order must be on {device} like gram, got {order.device}")
    # Only host values can be checked without a synchronisation.
    on_host = device.type == "cpu" and not is_traced()
    if on_host and not (order.sort(dim=1).values == torch.arange(num_tasks, device=device)).all():
        raise ValueError(f"each row of order must be a permutation of 0..{num_tasks - 1}, got {order.tolist()}")
    return order.contiguous()


def check_solver(solver: str, max_iter: int, tol: float) -> tuple[int, float]:
    """Return ``max_iter`` and ``tol``; ValueError unless all three are valid for :func:`min_norm_weights`."""
    check_choice("solver", solver, ("exact", "frank_wolfe"))
    return check_count("max_iter", max_iter), check_not_negative("tol", tol)


def _step_tensor(step: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(step, Tensor):
        if step.dtype != torch.int64:
            raise TypeError(f"step must be an int or an int64 tensor of one element, got {describe(step)}")
        if step.numel() != 1:
            raise ValueError(f"step must be an int or an int64 tensor of one element, got {describe(step)}")
        return step if step.dim() == 0 and step.device == device else step.reshape(()).to(device)
    return torch.full((), check_word("step", step), dtype=torch.int64, device=device)
