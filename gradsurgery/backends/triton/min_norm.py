# SPDX-License-Identifier: MIT
"""The shortest convex combination of the task gradients, exactly and by Frank-Wolfe."""

import triton
import triton.language as tl

from .problems import all_finite, load_gram, pick, sweep


@triton.jit
def matrix(gram, scale, shift, ridge, inverse, b, num_tasks, TASKS: tl.constexpr):
    """Return M = D (scale G + shift_i + shift_j + ridge I) D + b b^T with D = diag(inverse); 0 beyond T, where D is."""
    task = tl.arange(0, TASKS)
    g = load_gram(gram, num_tasks, TASKS) * scale + shift[:, None] + shift[None, :]
    g = tl.where(task[:, None] == task[None, :], g + ridge, g)
    return g * inverse[:, None] * inverse[None, :] + b[:, None] * b[None, :]


@triton.jit(do_not_specialize=["num_tasks"])
def exact(out, gram, num_tasks, TASKS: tl.constexpr):
    """Write argmin w^T G w over the simplex; program: problem.

    With v_i = |g_i| w_i, up to scale, it is the non-negative least squares problem M v >= b, v >= 0,
    v^T (M v - b) = 0 of b_i = min |g| / |g_i| and M = C + b b^T, where C_ij is the cosine of g_i and g_j. The
    active-set method of Lawson & Hanson (1974, chapter 23) takes the steps of Wolfe's algorithm on it. The table holds
    -M_SS^-1 for the active set S, and one exchange brings a task in or out.
    """
    problem = tl.program_id(0).to(tl.int64)
    gram += problem * num_tasks * num_tasks
    out += problem * num_tasks
    task = tl.arange(0, TASKS)
    inside = task < num_tasks
    square = tl.load(gram + task * (num_tasks + 1), mask=inside, other=float("inf"))
    norm = tl.sqrt(square)
    least = tl.min(norm, 0)
    shortest = tl.min(tl.where(norm == least, task, TASKS), 0)
    weights = tl.where(task == shortest, 1.0, 0.0).to(tl.float64)
    if all_finite(gram, num_tasks, TASKS):
        if least > 0:
            inverse_norm = tl.where(inside, 1.0 / norm, 0.0)
            b = tl.where(inside, least / norm, 0.0)
            zeros = tl.zeros([TASKS], tl.float64)
            v = descend(gram, 1.0, zeros, 0.0, inverse_norm, b, b, 0.0, num_tasks, TASKS)
            weights = v * inverse_norm * least
            weights = weights / tl.sum(weights, 0)
    else:
        weights = tl.full([TASKS], float("nan"), tl.float64)
    tl.store(out + task, weights, mask=inside)


@triton.jit
def descend(gram, scale, shift, ridge, inverse, outer, b, noise, num_tasks, TASKS: tl.constexpr):
    """Return v with M v >= b, v >= 0, v^T (M v - b) = 0 for the matrix() M with ``outer`` as its b.

    If M v >= b is missed by up to ``noise``, that does not count. Of the solutions on active sets, the one that misses
    it least is returned, because with nearly dependent gradients rounding lets sets cycle. With a ``ridge`` it ends if
    the task that misses it most makes the set dependent: that miss is rounding, which may have made M indefinite.
    """
    task = tl.arange(0, TASKS)
    table = matrix(gram, scale, shift, ridge, inverse, outer, num_tasks, TASKS)
    v = tl.zeros([TASKS], tl.float64)
    active = task < 0
    smallest = tl.full([], 1.0, tl.float64)
    best = v
    least = tl.full([], float("inf"), tl.float64)
    highest = tl.full([], float("-inf"), tl.float64)
    stalls = 0
    running = 1
    for _ in range(8 * num_tasks + 32):
        if running > 0:
            m = matrix(gram, scale, shift, ridge, inverse, outer, num_tasks, TASKS)
            z = solve(table, active, b)
            missing = b - tl.sum(m * z[None, :], 1)
            for _ in range(tl.where(smallest < 1e-4, 3, 1)):
                refined = z + solve(table, active, missing)
                rest = b - tl.sum(m * refined[None, :], 1)
                # Where rounding made M indefinite, the table is that of a matrix nearby, and refinement leads astray.
                better = largest(rest, active) < largest(missing, active)
                z = tl.where(better, refined, z)
                missing = tl.where(better, rest, missing)
            blocked = active & (z <= 0)
            ratio = tl.where(blocked & (v > z), v / tl.where(blocked & (v > z), v - z, 1.0), 0.0)
            ratio = tl.where(blocked, ratio, float("inf"))
            reach = tl.min(ratio, 0)
            leaving = tl.max(blocked.to(tl.int32), 0) > 0
            v = tl.where(active, tl.maximum(v + tl.where(leaving, reach, 1.0) * (z - v), 0.0), 0.0)
            excess = tl.where(active | (task >= num_tasks), float("-inf"), missing)
            worst = tl.max(excess, 0)
            found = tl.where(leaving, tl.where(ratio == reach, task, TASKS), tl.where(excess == worst, task, TASKS))
            k = tl.min(found, 0)
            pivot = pick(diagonal(table, TASKS), k, TASKS)
            if ~leaving:
                off = tl.maximum(worst, largest(missing, active)) / tl.sum(v, 0)
                ends = worst <= 1e-14 * tl.sum(v, 0) + noise
                better = off <= least
                best = tl.where(better, v, best)
                least = tl.where(better, off, least)
                value = tl.sum(v * (b + missing), 0)
                stalls = tl.where(value > highest, 0, stalls + 1)
                highest = tl.maximum(highest, value)
                smallest = tl.minimum(smallest, pivot)
                if ends | (stalls >= 8 + num_tasks // 8):
                    running = 0
            if running > 0:
                active = tl.where(task == k, ~leaving, active)
                if smallest < 1e-8:
                    floor = tl.where(ridge > 0, 1e-14, float("-inf"))
                    table, taken, smallest = invert(m, active, floor, TASKS)
                    running = tl.where(leaving, 1, tl.min((taken == active).to(tl.int32), 0))
                    active = taken
                    v = tl.where(active, v, 0.0)
                else:
                    v = tl.where(task == k, 0.0, v)
                    table = sweep(table, k, ~leaving, TASKS)[0]
    return best


@triton.jit
def invert(table, active, floor, TASKS: tl.constexpr):
    """Bring the active set into a table with an empty one, the largest pivot first, and only pivots above ``floor``.

    Returns the table, the tasks that came in and the least pivot.
    """
    task = tl.arange(0, TASKS)
    least = tl.full([], 1.0, tl.float64)
    taken = task < 0
    for _ in range(tl.sum(active.to(tl.int32), 0)):
        pivots = tl.where(active & ~taken, diagonal(table, TASKS), float("-inf"))
        pivot = tl.max(pivots, 0)
        if pivot > floor:
            k = tl.min(tl.where(pivots == pivot, task, TASKS), 0)
            table = sweep(table, k, True, TASKS)[0]
            taken = taken | (task == k)
            least = tl.minimum(least, pivot)
    return table, taken, least


@triton.jit
def diagonal(table, TASKS: tl.constexpr):
    """Return a table's diagonal."""
    task = tl.arange(0, TASKS)
    return tl.sum(tl.where(task[:, None] == task[None, :], table, 0.0), 1)


@triton.jit
def largest(values, active):
    """Return the largest magnitude on the active set."""
    return tl.max(tl.where(active, tl.abs(values), 0.0), 0)


@triton.jit
def solve(table, active, right):
    """Return M_SS^-1 right on the active set, 0 off it."""
    return tl.where(active, -tl.sum(table * tl.where(active, right, 0.0)[None, :], 1), 0.0)


@triton.jit(do_not_specialize=["num_tasks", "max_iter", "tol"])
def frank_wolfe(out, gram, num_tasks, max_iter, tol: tl.float64, TASKS: tl.constexpr):
    """Write the weights of Sener & Koltun 2018, Algorithm 2; program: problem."""
    problem = tl.program_id(0).to(tl.int64)
    gram += problem * num_tasks * num_tasks
    task = tl.arange(0, TASKS)
    inside = task < num_tasks
    g = load_gram(gram, num_tasks, TASKS)
    diagonal = tl.load(gram + task * (num_tasks + 1), mask=inside, other=0.0)
    w = tl.where(inside, 1.0, 0.0).to(tl.float64) / num_tasks
    running = tl.min(tl.min((g - g == 0).to(tl.int32), 1), 0)
    if running == 0:
        w = tl.full([TASKS], float("nan"), tl.float64)
    for _ in range(max_iter):
        if running > 0:
            gw = tl.sum(g * w[None, :], 1)
            wt = tl.min(tl.where(inside, gw, float("inf")), 0)
            vertex = tl.min(tl.where(inside & (gw == wt), task, TASKS), 0)
            ww = tl.sum(w * gw, 0)
            tt = pick(diagonal, vertex, TASKS)
            keep = (tt - wt) / (ww + tt - 2 * wt)
            keep = tl.where(wt >= ww, 1.0, tl.where(wt >= tt, 0.0, keep))
            w = w * keep + tl.where(task == vertex, 1 - keep, 0.0)
            running = (1 - keep >= tol).to(tl.int32)
    tl.store(out + problem * num_tasks + task, w, mask=inside)
