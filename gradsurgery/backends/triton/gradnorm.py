# SPDX-License-Identifier: MIT
"""GradNorm's update of the task weights."""

import triton
import triton.language as tl


@triton.jit
def updated(weights, norms, losses, initial, alpha, lr, num_tasks, inside):
    """Return the weights after one step."""
    ratio = tl.where(inside, losses / initial, 0.0)
    rate = ratio / (tl.sum(ratio, 0) / num_tasks)
    weighted = tl.where(inside, weights * norms, 0.0)
    power = tl.where(alpha == 0, 1.0, tl.exp2(alpha * tl.log2(rate)))
    excess = weighted - tl.sum(weighted, 0) / num_tasks * power
    # Comparisons with NaN are false, and its sign must be NaN.
    sign = tl.where(excess > 0, 1.0, tl.where(excess < 0, -1.0, excess))
    moved = weights - lr * sign * norms
    moved = tl.where(inside, tl.where(moved < 0, 0.0, moved), 0.0)
    total = tl.sum(moved, 0)
    return tl.where(total == 0, weights, moved * (num_tasks / total))


@triton.jit(do_not_specialize=["alpha", "lr", "num_tasks"])
def update(out, weights, norms, losses, initial, alpha: tl.float64, lr: tl.float64, num_tasks, TASKS: tl.constexpr):
    """Write new weights; program: problem."""
    first = tl.program_id(0).to(tl.int64) * num_tasks
    task = tl.arange(0, TASKS)
    inside = task < num_tasks
    w = tl.load(weights + first + task, mask=inside, other=0.0)
    n = tl.load(norms + first + task, mask=inside, other=0.0)
    now = tl.load(losses + first + task, mask=inside, other=1.0)
    before = tl.load(initial + first + task, mask=inside, other=1.0)
    tl.store(out + first + task, updated(w, n, now, before, alpha, lr, num_tasks, inside), mask=inside)


@triton.jit(do_not_specialize=["alpha", "lr", "num_tasks"])
def step(out, gram, losses, weights, initial, alpha: tl.float64, lr: tl.float64, num_tasks, TASKS: tl.constexpr):
    """Write the state's weights, NaN where a norm is not finite, and advance the state; program: problem."""
    problem = tl.program_id(0).to(tl.int64)
    first = problem * num_tasks
    task = tl.arange(0, TASKS)
    inside = task < num_tasks
    w = tl.load(weights + first + task, mask=inside, other=0.0)
    square = tl.load(gram + problem * num_tasks * num_tasks + task * (num_tasks + 1), mask=inside, other=0.0)
    now = tl.load(losses + first + task, mask=inside, other=1.0)
    before = tl.load(initial + first + task, mask=inside, other=1.0)
    norms = tl.sqrt(square)
    finite = tl.min((norms - norms == 0).to(tl.int32), 0) > 0
    tl.store(out + first + task, tl.where(finite, w, float("nan")), mask=inside)
    before = tl.where((before - before == 0) & (before > 0), before, now)
    tl.store(initial + first + task, before, mask=inside)
    moved = updated(w, norms, now, before, alpha, lr, num_tasks, inside)
    if tl.min((~inside | ((moved - moved == 0) & (now - now == 0) & (now >= 0))).to(tl.int32), 0) > 0:
        tl.store(weights + first + task, moved, mask=inside)
