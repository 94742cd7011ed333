# SPDX-License-Identifier: MIT
"""Projections on the cone of directions that conflict with no task (UPGrad, DualProj), and CAGrad."""

import triton
import triton.language as tl

from .min_norm import descend
from .problems import all_finite, load_gram, sweep


@triton.jit(do_not_specialize=["num_tasks", "ridge"])
def cone_projection(out, gram, preference, num_tasks, ridge: tl.float64, ALONE: tl.constexpr, TASKS: tl.constexpr):
    """Write argmin v^T H v with v >= u, H = G / trace(G) + ridge I; program: (problem, vector u).

    u is the preference, or with ALONE its entry of the program's task alone. z = v - u solves the problem of descend()
    with M = H and b = -H u. If v^T H v comes out negative, because G was rounded, it is solved with a larger ridge.
    """
    problem = tl.program_id(0).to(tl.int64)
    gram += problem * num_tasks * num_tasks
    task = tl.arange(0, TASKS)
    inside = task < num_tasks
    u = tl.load(preference + task, mask=inside, other=0.0)
    ridge += tl.zeros([], tl.float64)  # the interpreter hands on numbers in float32
    if ALONE:
        u = tl.where(task == tl.program_id(1), u, 0.0)
    v = tl.full([TASKS], float("nan"), tl.float64)
    if all_finite(gram, num_tasks, TASKS):
        zeros = tl.zeros([TASKS], tl.float64)
        running = 1
        for _ in range(12):
            if running > 0:
                scale, inverse, b, noise = terms(gram, u, ridge, num_tasks, TASKS)
                v = u + inverse * descend(gram, scale, zeros, ridge, inverse, zeros, b, noise, num_tasks, TASKS)
                hv = tl.sum(load_gram(gram, num_tasks, TASKS) * v[None, :], 1) * scale + ridge * v
                along = tl.where(inside, v / tl.where(inside, inverse, 1.0), 0.0)
                if tl.sum(v * hv, 0) < -1e-13 * tl.sum(along * along, 0):
                    ridge = tl.maximum(8 * ridge, 1.1641532182693481e-10)
                else:
                    running = 0
    tl.store(out + (problem * tl.num_programs(1) + tl.program_id(1)) * num_tasks + task, v, mask=inside)


@triton.jit
def terms(gram, u, ridge, num_tasks, TASKS: tl.constexpr):
    """Return 1 / trace(G), 1 / sqrt(H_ii), -H u times the latter, and the rounding of that, from |H^(1/2) u|."""
    task = tl.arange(0, TASKS)
    inside = task < num_tasks
    square = tl.load(gram + task * (num_tasks + 1), mask=inside, other=0.0)
    trace = tl.sum(square, 0)
    scale = tl.where(trace > 0, 1.0 / tl.where(trace > 0, trace, 1.0), 0.0)
    inverse = tl.where(inside, 1.0 / tl.sqrt(square * scale + ridge), 0.0)
    hu = tl.sum(load_gram(gram, num_tasks, TASKS) * u[None, :], 1) * scale + ridge * u
    length = tl.sqrt(tl.maximum(tl.sum(u * hu, 0), 0.0))
    return scale, inverse, -hu * inverse, 1e-13 * length


@triton.jit(do_not_specialize=["num_tasks", "c"])
def cagrad(out, gram, num_tasks, c: tl.float64, TASKS: tl.constexpr):
    """Write CAGrad's weights; program: problem.

    With kappa = c |g_0|: for a given lambda = kappa / |g_x| the x of the dual problem is that of the shortest convex
    combination of the vectors lambda g_t + g_0. The lambda with |lambda g_x| = kappa is found by a bracketed secant on
    squares. The bracket's ends are computed first, the upper one before the lower: at 2^11.5 times the lower end and,
    if that is too low, at 1e7 times, unless G is indefinite, where the result would be only rounding. If that is too
    low as well, the gradients are Pareto-stationary, and the last step is the projection of g_0 on the dual cone. For
    c >= 1 the shortest combination of the gradients, which tells whether they are stationary, comes before all this:
    whatever x is found, by convexity no square is less than |g_x|^2 - 2 max (|g_x|^2 - g_x . g_t).
    """
    problem = tl.program_id(0).to(tl.int64)
    gram += problem * num_tasks * num_tasks
    task = tl.arange(0, TASKS)
    inside = task < num_tasks
    even = tl.where(inside, 1.0, 0.0).to(tl.float64) / num_tasks
    diagonal = tl.load(gram + task * (num_tasks + 1), mask=inside, other=0.0)
    weights = even
    running = 0
    if all_finite(gram, num_tasks, TASKS):
        running = 1
    else:
        weights = tl.full([TASKS], float("nan"), tl.float64)
    g = load_gram(gram, num_tasks, TASKS)
    mean = tl.sum(g * even[None, :], 1)
    mean_squared = tl.maximum(tl.sum(mean * even, 0), 0.0)
    trace = tl.sum(diagonal, 0)
    target = c * c * mean_squared
    if (c <= 0) | (mean_squared <= 1e-15 * trace):
        running = 0
    cone_scale, cone_inverse, cone_b, cone_noise = terms(gram, even, 1e-12, num_tasks, TASKS)
    low = tl.sqrt(target / tl.where(trace > 0, trace, 1.0))
    high = 2896.309375740099 * low
    at = tl.where(c >= 1, 1.0, high)
    ends = tl.where(c >= 1, -1, 0)  # of the bracket that have been seen, counting the second upper one
    low_value = -target
    high_value = target
    side = 0
    stationary = target < 0
    for _ in range(45):
        if running > 0:
            shift = tl.where(ends < 0, 0.0, at * mean + 0.5 * mean_squared)
            square = tl.maximum(at * at * diagonal + 2 * shift, 0.0)
            norm = tl.where(inside, tl.sqrt(square), float("inf"))
            least = tl.min(norm, 0)
            inverse = tl.where(inside, 1.0 / tl.where(least > 0, norm, 1.0), 0.0)
            b = least * inverse
            scale = tl.where(stationary, cone_scale, at * at)
            shift = tl.where(stationary, 0.0, shift)
            inverse = tl.where(stationary, cone_inverse, inverse)
            outer = tl.where(stationary, 0.0, b)
            b = tl.where(stationary, cone_b, b)
            ridge = tl.where(stationary, 1e-12, 0.0)
            noise = tl.where(stationary, cone_noise, 0.0)
            x = descend(gram, scale, shift, ridge, inverse, outer, b, noise, num_tasks, TASKS) * inverse
            if stationary:
                squared = tl.maximum(tl.sum(x * tl.sum(g * x[None, :], 1), 0), target)
                weights = even + tl.sqrt(target / squared) * x  # not out of the ball, but for rounding
                running = 0
            else:
                shortest = tl.min(tl.where(norm == least, task, TASKS), 0)
                x = tl.where(least > 0, x, tl.where(task == shortest, 1.0, 0.0))
                x = x / tl.sum(x, 0)
                squared = tl.maximum(tl.sum(x * tl.sum(g * x[None, :], 1), 0), 0.0)
                value = at * at * squared - target
                factor = tl.sqrt(target / tl.where(squared > 0, squared, 1.0))
                weights = tl.where(squared > 0, even + factor * x, weights)
                settled = (ends > 2) & (tl.abs(value) <= 1e-12 * target)
                if ends < 0:
                    size = tl.sum(x * tl.sqrt(diagonal), 0)
                    lowest = tl.min(tl.where(inside, tl.sum(g * x[None, :], 1), float("inf")), 0)
                    stationary = squared <= tl.maximum(4e-14 * size * size, 2 * (squared - lowest))
                    ends = 0
                elif ends < 2:
                    high_value = value
                    stationary = value < 0
                    if (ends == 0) & stationary:
                        least = tl.full([], float("inf"), tl.float64)
                        table = tl.where(task[:, None] == task[None, :], g / trace + 1e-12, g / trace)
                        for t in range(num_tasks):
                            table, pivot = sweep(table, t, True, TASKS)
                            least = tl.minimum(least, pivot)
                        stationary = least <= 1e-14  # sweep() takes no pivot below it
                    ends = tl.where((value < 0) & ~stationary, ends + 1, 2)
                    high = tl.where((ends == 1) & (value < 0), 1e7 * low, high)
                elif ends == 2:
                    low_value = value
                    settled = value >= 0
                    ends = 3
                elif value < 0:
                    high_value = tl.where(side < 0, high_value / 2, high_value)
                    low = at
                    low_value = value
                    side = -1
                else:
                    low_value = tl.where(side > 0, low_value / 2, low_value)
                    high = at
                    high_value = value
                    side = 1
                if settled | (high - low <= 1e-15 * high):
                    running = 0
                a = low * low
                z = high * high
                secant = tl.sqrt(a - low_value * (z - a) / (high_value - low_value))
                at = tl.where(z > 1e6 * a, tl.sqrt(low * high), secant)
                at = tl.minimum(tl.maximum(at, low), high)
                at = tl.where(ends < 2, high, tl.where(ends == 2, low, at))
    tl.store(out + problem * num_tasks + task, weights, mask=inside)
