# SPDX-License-Identifier: MIT
"""PCGrad's visiting orders and weights."""

import triton
import triton.language as tl


@triton.jit
def visiting_orders(row, seed, step, num_tasks, TASKS: tl.constexpr):
    """Return each row's permutation of 0 .. T - 1, [rows, TASKS]; see gradsurgery.task_order."""
    position = tl.arange(0, TASKS)[None, :]
    low = (step & 0xFFFFFFFF).to(tl.uint32)
    high = (step >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, row[:, None].to(tl.uint32), (position // 4).to(tl.uint32))
    lane = position % 4
    word = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
    other = ((word.to(tl.uint64) * (num_tasks - position).to(tl.uint64)) >> 32).to(tl.int32)
    order = position + row[:, None] * 0
    for draw in range(num_tasks - 1):
        k = num_tasks - 1 - draw
        o = tl.sum(tl.where(position == draw, other, 0), 1)[:, None]
        picked = tl.sum(tl.where(position == o, order, 0), 1)[:, None]
        last = tl.sum(tl.where(position == k, order, 0), 1)[:, None]
        order = tl.where(position == k, picked, tl.where(position == o, last, order))
    return order


@triton.jit(do_not_specialize=["seed", "num_tasks"])
def write_orders(out, seed: tl.int64, step, num_tasks, TASKS: tl.constexpr, ROWS: tl.constexpr):
    """Write the visiting orders [T, T]; program: ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    order = visiting_orders(row, seed, tl.load(step), num_tasks, TASKS)
    position = tl.arange(0, TASKS)[None, :]
    mask = (row < num_tasks)[:, None] & (position < num_tasks)
    tl.store(out + row[:, None] * num_tasks + position, order.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["seed", "num_tasks"])
def project(
    out,
    gram,
    given,
    seed: tl.int64,
    step,
    num_tasks,
    MEAN: tl.constexpr,
    GIVEN: tl.constexpr,
    TASKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the coefficients of ROWS projected gradients' sum to [problems, programs, T]; program: (problem, rows)."""
    problem = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    task = tl.arange(0, TASKS)[None, :]
    inside = (row < num_tasks)[:, None] & (task < num_tasks)
    if GIVEN:
        order = tl.load(given + row[:, None] * num_tasks + task, mask=inside, other=0)
        order = tl.minimum(tl.maximum(order, 0), num_tasks - 1).to(tl.int32)  # it was not validated
    else:
        order = visiting_orders(row, seed, tl.load(step), num_tasks, TASKS)
    gram += problem * num_tasks * num_tasks
    c = tl.where(task == row[:, None], 1.0, 0.0).to(tl.float64)
    finite = inside
    for k in range(num_tasks):
        j = tl.sum(tl.where(task == k, order, 0), 1)
        g = tl.load(gram + j[:, None] * num_tasks + task, mask=inside, other=0.0)
        finite = finite & (g - g == 0)
        product = tl.sum(c * g, 1)
        square = tl.load(gram + j * (num_tasks + 1), mask=row < num_tasks, other=0.0)
        conflict = (product < 0) & (square > 0) & (j != row)
        step_back = tl.where(conflict, product / tl.where(square > 0, square, 1.0), 0.0)
        c -= tl.where(task == j[:, None], step_back[:, None], 0.0)
    weights = tl.sum(tl.where(inside, c, 0.0), 0)
    if MEAN:
        weights = weights / num_tasks
    bad = tl.max(tl.max((inside & ~finite).to(tl.int32), 1), 0)
    weights = tl.where(bad > 0, float("nan"), weights)
    position = tl.arange(0, TASKS)
    tl.store(
        out + (problem * tl.num_programs(1) + tl.program_id(1)) * num_tasks + position,
        weights,
        mask=position < num_tasks,
    )
