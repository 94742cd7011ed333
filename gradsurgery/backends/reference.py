# SPDX-License-Identifier: MIT
"""The reference backend: plain PyTorch on any device, float64 inside, written to be read next to the papers.

It is the oracle of every other backend. It never uses a float32 matrix product over the parameters (wrong by 1e-3 at
1e7 elements): gradients are cut into chunks, widened to float64, and summed there. It does not read values on the host,
with two exceptions: most solvers that iterate run there (``problems.at_hand``), and end when all problems have
converged; and on the CPU combine leaves out rows of weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._compiling import is_watched
from .._extension import Rule
from .._gradients import TaskGradients
from .._philox import philox_words, weights_uniforms
from . import rules, solvers
from .min_norm import frank_wolfe, wolfe
from .parts import chunks, parts
from .problems import at_hand, is_finite
from .simplex import project_on_simplex

_BLOCK = 256


class ReferenceBackend:
    """Serves every call on devices that have float64."""

    name = "reference"
    aggregate = None

    def why_not(self, device: torch.device, num_tasks: int) -> str | None:
        """Return why it cannot serve the call; None if it can."""
        return "Apple's GPUs have no float64: move the model to the CPU" if device.type == "mps" else None

    def describe(self) -> str:
        """Return one line on the backend."""
        return "available: plain PyTorch on any device, float64 inside"

    def gram(self, grads: TaskGradients, out: Tensor) -> None:
        """G[s] = sum over segment s's chunks J of J J^T, with the sum's rounding errors (Knuth's two-sum) added."""
        out.zero_()
        sums = out.view(-1, *out.shape[-2:])
        lost = torch.zeros_like(sums)
        for run, values in chunks(grads):
            segment = run[0].segment
            before, product = sums[segment].clone(), _products(values)
            sums[segment] += product
            added = sums[segment] - before
            lost[segment] += (before - (sums[segment] - added)) + (product - added)
        sums += torch.where(lost.isfinite(), lost, 0)
        upper = out.triu()
        out.copy_(upper + upper.triu(1).mT)

    def combine(self, grads: TaskGradients, weights: Tensor, out: Tensor | list[Tensor], accumulate: bool) -> None:
        """d_p = sum_t w_t g_{t,p}; a gradient with weight 0 does not count, even where it is not finite."""
        weights = weights.view(-1, weights.shape[-1])
        # Where values are at hand, rows that do not count are not read.
        counts = (weights != 0).tolist() if weights.device.type == "cpu" and not is_watched() else None
        # On the CPU 1 MB of sums, which caches hold; elsewhere 32 MB, for few launches.
        for part in parts(grads, out, 1 << (17 if grads.device.type == "cpu" else 22)):
            direction = torch.zeros_like(part.like, dtype=torch.float64)
            for t, (weight, row) in enumerate(zip(weights[part.segment].unbind(), part.rows, strict=True)):
                if row is None:
                    continue
                if counts is None:
                    direction += torch.where(weight != 0, weight * row.double(), 0)
                elif counts[part.segment][t]:
                    direction.addcmul_(row, weight)
            part.write(direction, accumulate)

    def combine_by_rule(self, grads: TaskGradients, rule: Rule, out: Tensor | list[Tensor], accumulate: bool) -> None:
        """Write (or add) the direction of a rule that works coordinate by coordinate."""
        rules.combine_by_rule(grads, rule, out, accumulate)

    def task_order(self, seed: int, step: Tensor, out: Tensor) -> None:
        """Fisher-Yates on all rows at once, with the words of Philox4x32-10."""
        num_tasks = out.shape[0]
        rows = torch.arange(num_tasks, device=out.device)
        out.copy_(rows.expand(num_tasks, num_tasks))
        draws = philox_words(rows, num_tasks - 1, seed, step)
        for draw, k in enumerate(range(num_tasks - 1, 0, -1)):
            other = (draws[:, draw] * (k + 1)) >> 32
            picked = out[rows, other]
            out[rows, other] = out[:, k]
            out[:, k] = picked

    def random(self, gram: Tensor, seed: int, step: Tensor, out: Tensor) -> None:
        """softmax(z) with normal numbers by Box and Muller's method."""
        radius, angle = weights_uniforms(2 * gram.shape[-1], seed, step).unflatten(0, (-1, 2)).unbind(1)
        normal = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
        out.copy_(torch.where(is_finite(gram), normal.softmax(0), torch.nan))
        step += 1

    def pcgrad(
        self, gram: Tensor, order: Tensor | None, seed: int, step: Tensor, advance: bool, mean: bool, out: Tensor
    ) -> None:
        """PCGrad, Algorithm 1: p = sum_k c_k g_k loses its component along each conflicting original g_j in turn."""
        num_tasks = gram.shape[-1]
        gram = gram.view(-1, num_tasks, num_tasks)
        if order is None:
            order = torch.empty(num_tasks, num_tasks, dtype=torch.int64, device=gram.device)
            self.task_order(seed, step, order)
        squared_norms = gram.diagonal(dim1=-2, dim2=-1)
        rows = torch.arange(num_tasks, device=gram.device)
        c = torch.eye(num_tasks, dtype=gram.dtype, device=gram.device).expand_as(gram).clone()
        for j in order.T.unbind():  # j[i]: the task that row i visits now
            product = (c * gram[:, j]).sum(-1)
            conflict = (product < 0) & (squared_norms[:, j] > 0) & (j != rows)
            c[:, rows, j] -= torch.where(conflict, product / squared_norms[:, j], 0)
        weights = c.mean(-2) if mean else c.sum(-2)
        out.copy_(torch.where(is_finite(gram), weights, torch.nan).view_as(out))
        if advance:
            step += 1

    def min_norm(self, gram: Tensor, exact: bool, max_iter: int, tol: float, out: Tensor) -> None:
        """Argmin of w^T G w over the simplex."""
        gram = at_hand(gram.view(-1, *gram.shape[-2:]))
        weights = wolfe(gram) if exact else frank_wolfe(gram, max_iter, tol)
        out.copy_(torch.where(is_finite(gram), weights, torch.nan).view_as(out))

    def weights(
        self, gram: Tensor, solver: str, preference: Tensor | None, parameter: float, limit: float, out: Tensor
    ) -> None:
        """Write the weights of one of ``solvers.SOLVERS``."""
        if solver != "krum":
            gram = at_hand(gram)
            preference = None if preference is None else preference.to(gram.device)
        solvers.solve(gram, solver, preference, parameter, limit, out)

    def simplex_steps(self, matrix: Tensor, lr: float, momentum: float, num_iter: int, weights: Tensor) -> None:
        """v = momentum v + A w and w = P(w - lr v), P the projection on the simplex."""
        w, velocity = weights, torch.zeros_like(weights)
        for _ in range(num_iter):
            velocity = momentum * velocity + (matrix @ w[..., None]).squeeze(-1)
            w = project_on_simplex(w - lr * velocity)
        weights.copy_(torch.where(is_finite(matrix), w, torch.nan))

    def gradvac(self, gram: Tensor, order: Tensor, beta: float, targets: Tensor, out: Tensor) -> None:
        """Write Gradient Vaccine's weights, and move its targets."""
        solvers.gradvac(gram, order, beta, targets, out)

    def gradnorm(self, inputs: Sequence[Tensor], alpha: float, lr: float, out: Tensor) -> None:
        """GradNorm, equations 1 and 2, differentiated by hand."""
        weights, norms, losses, initial_losses = inputs
        num_tasks = weights.shape[-1]
        ratio = losses / initial_losses
        rate = ratio / ratio.mean(-1, keepdim=True)
        weighted_norms = weights * norms
        target = weighted_norms.mean(-1, keepdim=True) * rate**alpha
        difference = weighted_norms - target
        sign = torch.where(difference.isnan(), torch.nan, difference.sign())
        moved = (weights - lr * sign * norms).clamp(min=0)
        total = moved.sum(-1, keepdim=True)
        out.copy_(torch.where(total == 0, weights, moved * (num_tasks / total)))

    def gradnorm_step(
        self, gram: Tensor, losses: Tensor, alpha: float, lr: float, state: tuple[Tensor, Tensor], out: Tensor
    ) -> None:
        """One step of GradNorm training, Algorithm 1.

        Values that are not finite, as in a step that a gradient scaler will skip, do not enter the weights, nor do
        negative losses. A loss of 0, as of a task without samples in the first batch, may not stand for L(0).
        """
        weights, initial = state
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        out.copy_(torch.where(norms.isfinite().all(-1, keepdim=True), weights, torch.nan))
        initial.copy_(torch.where(initial.isfinite() & (initial > 0), initial, losses))
        updated = torch.empty_like(weights)
        self.gradnorm([weights, norms, losses, initial], alpha, lr, updated)
        steps = (updated.isfinite() & losses.isfinite() & (losses >= 0)).all(-1, keepdim=True)
        weights.copy_(torch.where(steps, updated, weights))


def _products(rows: Tensor) -> Tensor:
    """J J^T. By blocks of columns if rows are few and long: several threads take half the time then."""
    num_tasks, columns = rows.shape
    if is_watched() or num_tasks > 32 or columns < 2 * _BLOCK:
        return rows @ rows.mT
    whole = columns // _BLOCK * _BLOCK
    blocks = rows[:, :whole].unflatten(1, (-1, _BLOCK)).transpose(0, 1)
    return torch.bmm(blocks, blocks.mT).sum(0) + rows[:, whole:] @ rows[:, whole:].mT
