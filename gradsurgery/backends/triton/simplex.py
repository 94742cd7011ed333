# SPDX-License-Identifier: MIT
"""Weights on the simplex: steps, and random ones."""

import triton
import triton.language as tl

from .problems import all_finite, load_gram


@triton.jit
def projected(x, inside, num_tasks):
    """Return argmin |w - x| over the simplex, max(x - tau, 0), by Michelot's algorithm (1986).

    tau is computed from a set that contains all tasks with w > 0; the others leave it until none are left.
    """
    x = x - tl.max(tl.where(inside, x, float("-inf")), 0)  # or large entries would swallow the 1
    tau = tl.full((), -1.0, tl.float64)
    count = num_tasks + 1
    shrinks = True
    while shrinks:
        kept = inside & (x > tau)
        left = tl.sum(kept.to(tl.int32), 0)
        shrinks = left < count
        count = left
        tau = tl.where(shrinks, (tl.sum(tl.where(kept, x, 0.0), 0) - 1.0) / left, tau)
    return tl.where(inside & ~(x <= tau), x - tau, 0.0)  # NaN stays


@triton.jit(do_not_specialize=["num_tasks", "lr", "momentum", "num_iter"])
def steps(weights, matrix, num_tasks, lr: tl.float64, momentum: tl.float64, num_iter, TASKS: tl.constexpr):
    """Take v = momentum v + A w and w = P(w - lr v) num_iter times; program: problem."""
    problem = tl.program_id(0).to(tl.int64)
    matrix += problem * num_tasks * num_tasks
    task = tl.arange(0, TASKS)
    inside = task < num_tasks
    w = tl.load(weights + problem * num_tasks + task, mask=inside, other=0.0)
    if all_finite(matrix, num_tasks, TASKS):
        velocity = w * 0.0
        for _ in range(num_iter):
            velocity = momentum * velocity + tl.sum(load_gram(matrix, num_tasks, TASKS) * w[None, :], 1)
            w = projected(w - lr * velocity, inside, num_tasks)
    else:
        w += float("nan")
    tl.store(weights + problem * num_tasks + task, w, mask=inside)


@triton.jit(do_not_specialize=["seed", "num_tasks"])
def random(out, gram, seed: tl.int64, step, num_tasks, TASKS: tl.constexpr):
    """Write softmax(z), z_t by Box and Muller's method from the step's words 2t and 2t + 1; program: problem."""
    problem = tl.program_id(0).to(tl.int64)
    task = tl.arange(0, TASKS)
    inside = task < num_tasks
    now = tl.load(step)
    low = (now & 0xFFFFFFFF).to(tl.uint32)
    high = (now >> 32).to(tl.uint32)
    row = tl.full((TASKS,), 0xFFFFFFFF, tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, row, (task // 2).to(tl.uint32))
    even = task % 2 == 0
    u = (tl.where(even, a, c).to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
    v = (tl.where(even, b, d).to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
    z = tl.sqrt(-2.0 * tl.log(u)) * tl.cos(6.283185307179586 * v)
    part = tl.where(inside, tl.exp(z), 0.0)
    weights = part / tl.sum(part, 0)
    finite = all_finite(gram + problem * num_tasks * num_tasks, num_tasks, TASKS)
    tl.store(out + problem * num_tasks + task, tl.where(finite, weights, float("nan")), mask=inside)
