# SPDX-License-Identifier: MIT
"""What the solvers of one problem per program share: loads of G, and exchanges in a symmetric table."""

import triton
import triton.language as tl


@triton.jit
def load_gram(gram, num_tasks, TASKS: tl.constexpr):
    """Return G with zeros beyond T."""
    task = tl.arange(0, TASKS)
    inside = (task < num_tasks)[:, None] & (task < num_tasks)[None, :]
    return tl.load(gram + task[:, None] * num_tasks + task[None, :], mask=inside, other=0.0)


@triton.jit
def all_finite(gram, num_tasks, TASKS: tl.constexpr):
    """Return whether G is finite."""
    g = load_gram(gram, num_tasks, TASKS)
    return tl.min(tl.min((g - g == 0).to(tl.int32), 1), 0) > 0


@triton.jit
def pick(values, index, TASKS: tl.constexpr):
    """Return values[index]."""
    return tl.sum(tl.where(tl.arange(0, TASKS) == index, values, 0.0), 0)


@triton.jit
def sweep(table, k, entering, TASKS: tl.constexpr):
    """Exchange k in a symmetric table: A -> A - a a^T / p off row and column k, which become a / p; p -> -1 / p.

    Returns the table and the pivot p.
    """
    task = tl.arange(0, TASKS)
    at_row = task[:, None] == k
    at_column = task[None, :] == k
    row = tl.sum(tl.where(at_row, table, 0.0), 0)
    column = tl.sum(tl.where(at_column, table, 0.0), 1)
    pivot = pick(row, k, TASKS)
    # Below it, k is affinely dependent on the active set to working precision.
    pivot = tl.where(entering, tl.maximum(pivot, 1e-14), pivot)
    sign = tl.where(entering, 1.0, -1.0)
    changed = table - (column / pivot)[:, None] * row[None, :]
    changed = tl.where(at_row, (sign * row / pivot)[None, :], changed)
    changed = tl.where(at_column, (sign * column / pivot)[:, None], changed)
    return tl.where(at_row & at_column, -1.0 / pivot, changed), pivot
