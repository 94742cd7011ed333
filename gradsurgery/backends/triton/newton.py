# SPDX-License-Identifier: MIT
"""FairGrad and Nash-MTL."""

import triton
import triton.language as tl

from .problems import all_finite, load_gram, sweep

LEAST_Y = tl.constexpr(1e-290)


@triton.jit
def power_of(x, exponent):
    """Return x to a power, x > 0, exactly for the exponents 0, 1 and -1."""
    rest = tl.exp2(exponent * tl.log2(x))
    return tl.where(exponent == 0, 1.0, tl.where(exponent == 1, x, tl.where(exponent == -1, 1.0 / x, rest)))


@triton.jit
def residual_of(y, matrix, pull, inside):
    """Return the relative norm of what K y lacks of the pulls, without y that cannot get smaller."""
    error = tl.where(inside, 1 - tl.sum(matrix * y[None, :], 1) / pull, 0.0)
    error = tl.where((y > LEAST_Y) | (error > 0), error, 0.0)
    return tl.sqrt(tl.sum(error * error, 0))


@triton.jit(do_not_specialize=["num_tasks", "alpha", "limit"])
def fairgrad(out, gram, num_tasks, alpha: tl.float64, limit: tl.float64, TASKS: tl.constexpr):
    """Write w with (G w)_i = w_i^(-1 / alpha), shortened to |d| <= limit; program: problem.

    By Newton's method on the convex function whose minimum that is, with a larger ridge where it is not convex, as in
    csrc/solvers/newton.h.
    """
    problem = tl.program_id(0).to(tl.int64)
    gram += problem * num_tasks * num_tasks
    task = tl.arange(0, TASKS)
    inside = task < num_tasks
    is_diagonal = task[:, None] == task[None, :]
    # As tensors: the interpreter hands on numbers in float32.
    power = 1 / (alpha + tl.zeros([], tl.float64))
    weights = tl.full([TASKS], float("nan"), tl.float64)
    if all_finite(gram, num_tasks, TASKS):
        g = load_gram(gram, num_tasks, TASKS)
        norms = tl.sqrt(tl.load(gram + task * (num_tasks + 1), mask=inside, other=0.0))
        largest = tl.max(norms, 0)
        n = norms / tl.where(largest > 0, largest, 1.0)
        inverse = tl.where(norms > 0, 1.0 / tl.where(norms > 0, norms, 1.0), 0.0)
        cosines = tl.minimum(tl.maximum(g * inverse[:, None] * inverse[None, :], -1.0), 1.0)
        ridge = tl.full([], 1e-12, tl.float64)
        c = tl.where(n > 0, power_of(tl.where(n > 0, n, 1.0), power - 1), 1.0)
        start = power_of(c, 1 / (1 + power))
        y = start
        last = tl.full([], float("inf"), tl.float64)
        running = 1
        for _ in range(400):
            if running > 0:
                matrix = tl.where(is_diagonal, 1 + ridge, cosines)
                pull = c * power_of(y, -power)
                missing = tl.where(inside, pull - tl.sum(matrix * y[None, :], 1), 0.0)
                residual = residual_of(y, matrix, pull, inside)
                if residual > 1e-15:
                    hessian = tl.where(is_diagonal, matrix + (power * pull / y)[None, :], matrix)
                    table = hessian
                    least = tl.full([], float("inf"), tl.float64)
                    for t in range(num_tasks):
                        table, pivot = sweep(table, t, True, TASKS)
                        least = tl.minimum(least, pivot)
                    if least > 1e-14:
                        direction = tl.where(inside, -tl.sum(table * missing[None, :], 1), 0.0)
                        rest = tl.where(inside, missing - tl.sum(hessian * direction[None, :], 1), 0.0)
                        direction -= tl.where(inside, tl.sum(table * rest[None, :], 1), 0.0)
                        part = tl.minimum(direction / y, 0.0)
                        fallen = tl.maximum(y * power_of(1 - power * part, -1 / power), LEAST_Y)
                        fallen = tl.where(part < 0, fallen, y + direction)
                        y = tl.where(tl.min(part, 0) < -0.9, fallen, y + direction)
                        if (residual <= 1e-3) & ~(residual < 0.5 * last):
                            running = 0
                        last = residual
                    else:  # sweep() takes no pivot below it
                        y = start
                        ridge = tl.maximum(8 * ridge, num_tasks * 1.1920928955078125e-07)
                        last = tl.full([], float("inf"), tl.float64)
                else:
                    running = 0
        scale = power_of(tl.where(largest > 0, largest, 1.0), -2 / (1 + power))
        weights = tl.where(n > 0, y / tl.where(n > 0, n, 1.0) * scale, 0.0)
        length = tl.sqrt(tl.maximum(tl.sum(weights * tl.sum(g * weights[None, :], 1), 0), 0.0))
        weights *= tl.where(length > limit, limit / length, 1.0)
    tl.store(out + problem * num_tasks + task, weights, mask=inside)
