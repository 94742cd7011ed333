# SPDX-License-Identifier: MIT
"""Stage 4: the weighted sum of the rows, in float64, rounded once."""

import triton
import triton.language as tl

from .products import mask_of, rounded

# Rows whose loads are in flight together.
UNROLL = tl.constexpr(4)


@triton.jit(
    do_not_specialize=["out", "base", "row_bytes", "columns", "num_tasks", "blocks_per_slot"],
    do_not_specialize_on_alignment=["table", "slots"],
)
def weighted_sums(
    weights,
    out: tl.int64,
    base: tl.int64,
    row_bytes: tl.int64,
    columns: tl.int64,
    num_tasks,
    table,
    slots,
    blocks_per_slot: tl.int64,
    LISTED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write d = sum_t w_t g_t over this program's slot.

    Rows whose weight is 0 are not read. The slots go backwards: what the Gram kernel read last is still in the cache.
    """
    # The interpreter takes an integer's width from its value.
    row_bytes = row_bytes.to(tl.int64)
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    if LISTED:
        piece = tl.load(slots + slot * 4)
        block = tl.load(slots + slot * 4 + 1)
        left = tl.load(slots + slot * 4 + 2)
    else:
        piece = slot.to(tl.int64) * 0
        block = slot * blocks_per_slot
        left = tl.minimum(blocks_per_slot, (columns + BLOCK - 1) // BLOCK - block)
    while left > 0:
        row = table + piece * (num_tasks + 3)
        if LISTED:
            columns = tl.load(row)
            weight = weights + tl.load(row + 1) * num_tasks
            out = tl.load(row + 2)
        else:
            weight = weights
        end = tl.minimum(block + left, (columns + BLOCK - 1) // BLOCK)
        whole = tl.minimum(end, columns // BLOCK)
        for i in range(block, whole):
            write_block(
                weight,
                out,
                base,
                row_bytes,
                row,
                i * BLOCK,
                columns,
                num_tasks,
                LISTED,
                ACCUMULATE,
                DTYPE,
                ALIGNED,
                False,
                BLOCK,
            )
        for i in range(whole, end):
            write_block(
                weight,
                out,
                base,
                row_bytes,
                row,
                i * BLOCK,
                columns,
                num_tasks,
                LISTED,
                ACCUMULATE,
                DTYPE,
                ALIGNED,
                True,
                BLOCK,
            )
        left -= end - block
        piece += 1
        block = end * 0


@triton.jit
def write_block(
    weight,
    out,
    base,
    row_bytes,
    row,
    begin,
    columns,
    num_tasks,
    LISTED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write columns begin .. begin + BLOCK of one piece."""
    offsets = begin + tl.arange(0, BLOCK)
    inside = offsets < columns
    target = out.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        target = tl.multiple_of(target, 16)
    acc = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_tasks, UNROLL):
        for t in tl.static_range(UNROLL):
            task = first + t
            exists = task < num_tasks
            if LISTED:
                address = tl.load(row + 3 + task, mask=exists, other=0)
            else:
                address = base + task * row_bytes
            w = tl.load(weight + task, mask=exists & (address != 0), other=0.0)
            pointer = address.to(tl.pointer_type(DTYPE))
            if ALIGNED:
                pointer = tl.multiple_of(pointer, 16)
            mask = mask_of(w != 0, offsets, columns, TAIL)
            acc += w * tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float64)
    mask = inside if TAIL else None
    if ACCUMULATE:
        acc += tl.load(target + offsets, mask=mask).to(tl.float64)
    if DTYPE == tl.float64:
        tl.store(target + offsets, acc, mask=mask)
    else:
        tl.store(target + offsets, rounded(acc.to(tl.float32), DTYPE), mask=mask)
