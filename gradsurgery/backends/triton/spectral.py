# SPDX-License-Identifier: MIT
"""The methods that need G's eigenvalues: IMTL-G, ConFIG, Aligned-MTL."""

import triton
import triton.language as tl

from .problems import all_finite, load_gram, sweep

ROUNDING = tl.constexpr(2.0**-23)
"""An eigenvalue up to this times T times the largest one counts as 0."""


@triton.jit
def diagonalize(rows, TASKS: tl.constexpr):
    """Return the eigenvalues of a positive semidefinite matrix, in no order, and their eigenvectors as rows.

    One-sided Jacobi rotations of disjoint pairs of rows at a time (a tournament) until all rows are orthogonal, which
    turns V diag(lambda) V^T into diag(lambda) V^T. Each row takes its part of its pair's rotation from both rows.
    """
    task = tl.arange(0, TASKS)
    ROUNDS: tl.constexpr = TASKS - 1 if TASKS > 1 else 1
    running = 1
    for _ in range(15):
        if running > 0:
            running = 0
            for number in range(TASKS - 1):
                other = (2 * number - task + 2 * ROUNDS) % ROUNDS
                other = tl.where(task == TASKS - 1, number, tl.where(task == number, TASKS - 1, other))
                theirs = tl.gather(rows, tl.broadcast_to(other[:, None], [TASKS, TASKS]), 0)
                first = task < other
                own_square = tl.sum(rows * rows, 1)
                other_square = tl.sum(theirs * theirs, 1)
                product = tl.sum(rows * theirs, 1)
                turns = tl.abs(product) > 1e-15 * tl.sqrt(own_square) * tl.sqrt(other_square)
                running = tl.maximum(running, tl.max(turns.to(tl.int32), 0))
                apart = tl.where(first, other_square - own_square, own_square - other_square)
                zeta = tl.where(turns, apart / (2 * tl.where(turns, product, 1.0)), float("inf"))
                tangent = tl.where(zeta < 0, -1.0, 1.0) / (tl.abs(zeta) + tl.sqrt(1 + zeta * zeta))
                cosine = 1.0 / tl.sqrt(1 + tangent * tangent)
                sine = cosine * tl.where(first, -tangent, tangent)
                rows = cosine[:, None] * rows + sine[:, None] * theirs
    values = tl.sqrt(tl.sum(rows * rows, 1))
    return values, rows * tl.where(values > 0, 1.0 / tl.where(values > 0, values, 1.0), 0.0)[:, None]


@triton.jit
def solve_cosines(gram, preference, norms, num_tasks, TASKS: tl.constexpr):
    """Return c = pinv(K) p with the matrix K of cosines (0 for a zero gradient), and its length sqrt(c^T K c).

    Eigenvalues up to T 2^-23 times the largest one count as 0. If hardly more is then left of p, c = 0. Exchanges alone
    suffice if trace(K^-1), which no 1 / pivot exceeds, shows that no eigenvalue counts as 0.
    """
    task = tl.arange(0, TASKS)
    is_diagonal = task[:, None] == task[None, :]
    inverse = tl.where(norms > 0, 1.0 / tl.where(norms > 0, norms, 1.0), 0.0)
    cosines = load_gram(gram, num_tasks, TASKS) * inverse[:, None] * inverse[None, :]
    p = tl.where(norms > 0, preference, 0.0)
    rounding = num_tasks.to(tl.float64) * ROUNDING
    table = tl.where(is_diagonal, tl.where(norms > 0, cosines, 1.0), cosines)
    independent = 1
    for t in range(num_tasks):
        table, pivot = sweep(table, t, True, TASKS)
        independent = tl.where(pivot > rounding * num_tasks, independent, 0)
    trace = -tl.sum(tl.where(task < num_tasks, tl.sum(tl.where(is_diagonal, table, 0.0), 1), 0.0), 0)
    c = tl.where(task < num_tasks, -tl.sum(table * p[None, :], 1), 0.0)
    squared = tl.sum(c * p, 0)
    if (independent == 0) | (trace * rounding * num_tasks >= 1):
        values, vectors = diagonalize(cosines, TASKS)
        kept = values > rounding * tl.max(values, 0)
        along = tl.where(kept, tl.sum(vectors * p[None, :], 1), 0.0)
        enough = tl.sum(along * along, 0) > rounding * rounding * tl.sum(p * p, 0)
        factor = tl.where(enough, along / tl.where(kept, values, 1.0), 0.0)
        c = tl.sum(factor[:, None] * vectors, 0)
        squared = tl.sum(factor * along, 0)
    return c, tl.sqrt(tl.maximum(squared, 0.0))


@triton.jit(do_not_specialize=["num_tasks"])
def from_cosines(out, gram, preference, num_tasks, CONFIG: tl.constexpr, TASKS: tl.constexpr):
    """Write ConFIG's weights, or IMTL-G's; program: problem."""
    problem = tl.program_id(0).to(tl.int64)
    gram += problem * num_tasks * num_tasks
    task = tl.arange(0, TASKS)
    inside = task < num_tasks
    weights = tl.full([TASKS], float("nan"), tl.float64)
    if all_finite(gram, num_tasks, TASKS):
        norms = tl.sqrt(tl.load(gram + task * (num_tasks + 1), mask=inside, other=0.0))
        p = tl.where(inside, 1.0, 0.0).to(tl.float64)
        if CONFIG:
            p = tl.load(preference + task, mask=inside, other=0.0)
        c, length = solve_cosines(gram, p, norms, num_tasks, TASKS)
        v = tl.where(norms > 0, c / tl.where(norms > 0, norms, 1.0), 0.0)
        if CONFIG:
            v = tl.where(length > 0, v / tl.where(length > 0, length, 1.0), 0.0)
            weights = v * tl.sum(tl.sum(load_gram(gram, num_tasks, TASKS) * v[None, :], 1), 0)
        else:
            total = tl.sum(v, 0)
            some = tl.abs(total) > 1e-12 * tl.sum(tl.abs(v), 0)
            weights = tl.where(some, v / tl.where(some, total, 1.0), 0.0)
    tl.store(out + problem * num_tasks + task, weights, mask=inside)


@triton.jit(do_not_specialize=["num_tasks"])
def aligned_mtl(out, gram, preference, num_tasks, MODE: tl.constexpr, TASKS: tl.constexpr):
    """Write w = sqrt(scale) V diag(lambda)^(-1/2) V^T p, scale by MODE: min, median or rmse; program: problem."""
    problem = tl.program_id(0).to(tl.int64)
    gram += problem * num_tasks * num_tasks
    task = tl.arange(0, TASKS)
    inside = task < num_tasks
    weights = tl.full([TASKS], float("nan"), tl.float64)
    if all_finite(gram, num_tasks, TASKS):
        p = tl.load(preference + task, mask=inside, other=0.0)
        trace = tl.sum(tl.load(gram + task * (num_tasks + 1), mask=inside, other=0.0), 0)
        rows = load_gram(gram, num_tasks, TASKS) * tl.where(trace > 0, 1.0 / tl.where(trace > 0, trace, 1.0), 0.0)
        values, vectors = diagonalize(rows, TASKS)
        kept = values > num_tasks.to(tl.float64) * ROUNDING * tl.max(values, 0)
        rank = tl.sum(kept.to(tl.int32), 0)
        if MODE == "min":
            scale = tl.min(tl.where(kept, values, float("inf")), 0)
        elif MODE == "median":
            # The lower one: as many kept values are below it as above, or one less.
            below = values[None, :] < values[:, None]
            below = below | ((values[None, :] == values[:, None]) & (task[None, :] < task[:, None]))
            before = tl.sum((below & kept[None, :]).to(tl.int32), 1)
            scale = tl.sum(tl.where(kept & (before == (rank - 1) // 2), values, 0.0), 0)
        else:
            scale = tl.sum(tl.where(kept, values, 0.0), 0) / tl.maximum(rank, 1)
        along = tl.sum(vectors * p[None, :], 1)
        factor = tl.where(kept, tl.sqrt(scale / tl.where(kept, values, 1.0)) * along, 0.0)
        weights = tl.where(rank > 0, tl.sum(factor[:, None] * vectors, 0), p)
    tl.store(out + problem * num_tasks + task, weights, mask=inside)
