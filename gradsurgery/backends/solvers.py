# SPDX-License-Identifier: MIT
"""The T x T solvers in plain PyTorch, batched, on any device: the oracle of the compiled ones, and their stand-in.

No value is read on the host, with one exception: on the CPU, where that costs nothing, an iteration ends early when all
problems have converged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dual_cone import dual_cone
from .min_norm import wolfe
from .pcd import pcd
from .problems import all_done, equal_preference, is_finite, squared_length
from .spectral import aligned_mtl, config, imtl_g

SOLVERS = (
    "upgrad",
    "dualproj",
    "cagrad",
    "fairgrad",
    "imtl_g",
    "config",
    "aligned_mtl_min",
    "aligned_mtl_median",
    "aligned_mtl_rmse",
    "krum",
    "pcd",
)
"""Weights that are a function of G, a preference and at most two numbers."""

_LEAST_Y = 1e-290
_CANCELLED = 1e-12
"""A sum whose square is less than this share of its terms' squares is rounding, and counts as 0."""


def solve(
    gram: Tensor,
    solver: str,
    preference: Tensor | None,
    parameter: float,
    limit: float,
    out: Tensor,
    project: Callable[[Tensor, Tensor, float], Tensor] = dual_cone,
) -> None:
    """Write the weights for G [..., T, T], NaN where it is not finite; KeyError for a name not in SOLVERS.

    ``project`` replaces :func:`dual_cone` within PCD.
    """
    if solver not in SOLVERS:
        raise KeyError(solver)
    num_tasks = gram.shape[-1]
    gram = gram.view(-1, num_tasks, num_tasks)
    finite = is_finite(gram)
    gram = torch.where(finite[..., None], gram, 0)
    shares = parameter if preference is None else preference  # of pcd
    if preference is None:
        preference = equal_preference(gram, solver)
    if solver == "pcd":
        weights = pcd(gram, shares, project)
    elif solver == "upgrad":
        weights = dual_cone(gram, preference.diag(), parameter).sum(-2)
    elif solver == "dualproj":
        weights = dual_cone(gram, preference[None], parameter).squeeze(-2)
    elif solver == "cagrad":
        weights = _cagrad(gram, parameter)
    elif solver == "fairgrad":
        weights = _fairgrad(gram, parameter)
        norm = squared_length(gram, weights).sqrt()
        weights = weights * torch.where(norm > limit, limit / norm, 1)
    elif solver == "krum":
        weights = _krum(gram, int(parameter), int(limit))
    elif solver == "imtl_g":
        weights = imtl_g(gram)
    elif solver == "config":
        weights = config(gram, preference)
    else:
        weights = aligned_mtl(gram, preference, solver.removeprefix("aligned_mtl_"))
    out.copy_(torch.where(finite, weights, torch.nan).view_as(out))


def gradvac(gram: Tensor, order: Tensor, beta: float, targets: Tensor, out: Tensor) -> None:
    """Gradient Vaccine, Algorithm 1, all rows i at once: p_i = sum_k c_ik g_k gets the wanted cosine with each g_j."""
    num_tasks = gram.shape[-1]
    gram, goals = gram.view(-1, num_tasks, num_tasks), targets.view(-1, num_tasks, num_tasks)
    finite = is_finite(gram)
    rows = torch.arange(num_tasks, device=gram.device)
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    c = torch.eye(num_tasks, dtype=gram.dtype, device=gram.device).expand_as(gram).clone()
    goals_after = goals.clone()
    for j in order.T.unbind():
        product = (c * gram[:, j]).sum(-1)
        squared, terms = ((c @ gram) * c).sum(-1), (c * norms[..., None, :]).square().sum(-1)
        norm = torch.where(squared > _CANCELLED * terms, squared, 0).sqrt()
        counts = (norm > 0) & (norms[:, j] > 0) & (j != rows)
        rho = torch.where(counts, product / norm / norms[:, j], 0).clamp(-1, 1)
        goal = goals_after[:, rows, j].clamp(max=1 - 1e-8)
        sine = (1 - goal.square()).sqrt()
        step = norm / norms[:, j] * (goal * (1 - rho.square()).sqrt() - rho * sine) / sine
        c[:, rows, j] += torch.where(counts & (rho < goal), step, 0)
        moved = (1 - beta) * goals_after[:, rows, j] + beta * rho
        goals_after[:, rows, j] = torch.where(counts, moved, goals_after[:, rows, j])
    out.copy_(torch.where(finite, c.sum(-2), torch.nan).view_as(out))
    goals.copy_(torch.where(finite[..., None], goals_after, goals))


def _cagrad(gram: Tensor, c: float) -> Tensor:
    """Return CAGrad's weights.

    With kappa = c |g_0|: for a given lambda = kappa / |g_x| the x of the dual problem is that of the shortest convex
    combination of the vectors lambda g_t + g_0. The lambda with |lambda g_x| = kappa is found by a bracketed secant on
    squares.
    """
    num_tasks = gram.shape[-1]
    mean = gram.mean(-1)
    mean_squared = mean.mean(-1, keepdim=True).clamp(min=0)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    target = c**2 * mean_squared
    x: Any = None

    def excess(square: Tensor) -> Tensor:
        """Return |lambda g_x|^2 - kappa^2 for lambda^2; x becomes this lambda's, starting from the last lambda's."""
        nonlocal x
        scale = square.sqrt()[..., None]
        shifted = scale**2 * gram + scale * (mean[:, :, None] + mean[:, None]) + mean_squared[..., None]
        shifted.diagonal(dim1=-2, dim2=-1).clamp_(min=0)
        x = wolfe(shifted, x)
        return square * squared_length(gram, x) - target

    wanted = (c > 0) & (mean_squared > 1e-15 * trace)
    least = torch.where(wanted, target / trace, 1)  # the root is above
    low, high = torch.zeros_like(least), 2.0**23 * least
    before, before_value = low, -target
    last, last_value = high, excess(high)
    if not all_done((last_value >= 0) | ~wanted):
        # The root may be farther out, where a G that was rounded to float32 is only noise, unless it is definite.
        eye = torch.eye(num_tasks, dtype=gram.dtype, device=gram.device)
        definite = torch.linalg.cholesky_ex(gram + 1e-12 * trace[..., None] * eye)[1][:, None] == 0
        far = definite & (last_value < 0)
        before, before_value = torch.where(far, high, before), torch.where(far, last_value, before_value)
        low, high = torch.where(far, high, low), torch.where(far, 1e14 * least, high)
        last, last_value = high, excess(high)
    stationary = last_value < 0
    if c >= 1:
        # No lambda solves the problem of stationary gradients, which rounding may hide at a large lambda. Whatever x
        # the solver found, by convexity no combination's square is less than |g_x|^2 - 2 max (|g_x|^2 - g_x . g_t).
        shortest = wolfe(gram)
        terms = (shortest * gram.diagonal(dim1=-2, dim2=-1).sqrt()).sum(-1, keepdim=True)
        squared = squared_length(gram, shortest)
        lacking = squared - (gram @ shortest[..., None]).squeeze(-1).amin(-1, keepdim=True)
        stationary = stationary | (squared <= torch.maximum(4e-14 * terms.square(), 2 * lacking))
    settled = ~wanted | stationary
    for step in range(40):
        settled = settled | (high - low <= 1e-15 * high)
        if all_done(settled):
            break
        # The secant of the last two points; a mean of the bracket if the secant leaves it or progress is slow.
        secant = last - last_value * (last - before) / (last_value - before_value)
        slow = (step > 0) & (last_value.abs() > 0.5 * before_value.abs())
        left = ~((secant > low) & (secant < high))
        found = torch.where(slow | left, (torch.maximum(low, least) * high).sqrt(), secant)
        found = torch.where(settled, last, found)
        value = excess(found)
        before, before_value = torch.where(settled, before, last), torch.where(settled, before_value, last_value)
        last, last_value = found, torch.where(settled, last_value, value)
        settled = settled | (value.abs() <= 1e-12 * target)
        low = torch.where(~settled & (value < 0), found, low)
        high = torch.where(~settled & (value >= 0), found, high)
    even = 1 / num_tasks
    squared = squared_length(gram, x)
    stationary |= squared == 0
    weights = even + (target / squared).sqrt() * x
    added = dual_cone(gram, torch.full_like(mean[:1], even), 1e-12).squeeze(-2) - even
    cone = even + (target / torch.maximum(squared_length(gram, added), target)).sqrt() * added
    return torch.where(wanted, torch.where(stationary, cone, weights), even)


def _fairgrad(gram: Tensor, alpha: float) -> Tensor:
    """Return w with (G w)_i = w_i^(-1 / alpha), by Newton's method on the convex function whose minimum that is.

    y_i is w_i |g_i|, up to scale, and p = 1 / alpha. In a step that takes some y_i further than nine tenths of the way
    to 0, the step of those that get smaller is one in y_i^-p, in which the equation of a small y_i is linear. If a
    second derivative shows that the function is not convex, which rounding of G can cause, the method starts again with
    a larger ridge on the cosines.
    """
    num_tasks = gram.shape[-1]
    power = 1 / alpha
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    largest = norms.max(-1, keepdim=True).values
    n = torch.where(largest > 0, norms / largest, 0)
    pair = (n > 0)[..., :, None] & (n > 0)[..., None, :]
    eye = torch.eye(num_tasks, dtype=gram.dtype, device=gram.device)
    scaled = norms[..., :, None] * norms[..., None, :]
    cosines = torch.where(eye > 0, 1, torch.where(pair, gram / scaled, 0).clamp(-1, 1))
    ridge = torch.full_like(largest, 1e-12)
    c = torch.where(n > 0, n ** (power - 1), 1)
    y = start = c ** (1 / (1 + power))
    last = torch.full_like(largest, torch.inf)
    settled = torch.zeros_like(largest, dtype=torch.bool)

    def measure(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pulls c y^-p, what K y lacks of them, and its relative norm, without y that can't get smaller."""
        pull = c * y**-power
        missing = pull - (matrix @ y[..., None]).squeeze(-1)
        error = missing / pull
        return pull, missing, torch.where((y > _LEAST_Y) | (error > 0), error, 0).norm(dim=-1, keepdim=True)

    for _ in range(400):
        matrix = cosines + ridge[..., None] * eye
        pull, missing, residual = measure(y)
        settled = settled | ~(residual > 1e-15)
        if all_done(settled):
            break
        factor, info = torch.linalg.cholesky_ex(matrix + (power * pull / y)[..., None] * eye)
        convex = (info == 0)[..., None]
        direction = torch.cholesky_solve(missing[..., None], factor).squeeze(-1)
        part = (direction / y).clamp(max=0)
        falls = (part < 0) & (part.min(-1, keepdim=True).values < -0.9)
        moved = torch.where(falls, (y * (1 - power * part) ** -alpha).clamp(min=_LEAST_Y), y + direction)
        ends = convex & ~((residual > 1e-3) | (residual < 0.5 * last))  # as good as rounding allows
        stays = settled | (ends & ~(measure(moved)[2] < residual))
        y = torch.where(stays, y, torch.where(convex, moved, start))
        ridge = torch.where(settled | convex, ridge, (8 * ridge).clamp(min=num_tasks * 2.0**-23))
        settled = settled | ends
        last = torch.where(convex, residual, torch.inf)
    return torch.where(n > 0, y / torch.where(n > 0, n, 1) * largest ** (-2 / (1 + power)), 0)


def _krum(gram: Tensor, num_byzantine: int, num_selected: int) -> Tensor:
    """Return 1 / m for the m tasks whose squared distances to the nearest others have the least sums."""
    num_tasks = gram.shape[-1]
    squares = gram.diagonal(dim1=-2, dim2=-1)
    distances = (squares[..., :, None] + squares[..., None, :] - 2 * gram).clamp(min=0)
    others = distances + torch.diag_embed(torch.full_like(squares, torch.inf))
    nearest = max(num_tasks - num_byzantine - 2, 0)
    scores = others.sort(-1).values[..., :nearest].sum(-1)
    selected = scores.sort(dim=-1, stable=True).indices[..., :num_selected]
    return torch.zeros_like(scores).scatter_(-1, selected, 1 / num_selected)
