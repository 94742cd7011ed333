# SPDX-License-Identifier: MIT
"""Stage 2: partial Gram matrices by slot, and their sum in float64."""

import triton
import triton.language as tl

from .products import FLOAT32, ROWS, SIDE, STEP, add_float32, add_float64, add_rows, add_scaled, fits


@triton.jit
def addresses(base, row_bytes, row, first, num_tasks, LISTED: tl.constexpr, COUNT: tl.constexpr):
    """Return the addresses of COUNT rows of a piece from task ``first`` on; 0 where there is none."""
    task = first + tl.arange(0, COUNT)
    if LISTED:
        return tl.load(row + 3 + task, mask=task < num_tasks, other=0)
    else:
        return tl.where(task < num_tasks, base + task * row_bytes, 0)


@triton.jit
def slot_total(
    base,
    row_bytes,
    columns,
    num_tasks,
    table,
    slots,
    blocks_per_slot,
    x_first,
    y_first,
    LISTED: tl.constexpr,
    TASKS: tl.constexpr,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    DOT: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return the sums of products over this program's slot, and the bits of its rows' largest magnitudes."""
    SAME: tl.constexpr = TASKS <= SIDE
    COUNT: tl.constexpr = TASKS if SAME else SIDE
    sums = ()
    if MODE == ROWS:
        for _ in tl.static_range(TASKS * (TASKS + 1) // 2):
            sums = sums + (tl.zeros([BLOCK * DTYPE.primitive_bitwidth // 128], tl.float64),)
        x_top, y_top = 0, 0
    else:
        sums = tl.zeros([COUNT, COUNT], tl.float64)
        x_top = tl.zeros([COUNT, STEP], tl.int32 if DTYPE == tl.float32 else tl.int16)
        y_top = x_top
    # The interpreter takes an integer's width from its value.
    row_bytes = row_bytes.to(tl.int64)
    slot = tl.program_id(0)
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
        end = tl.minimum(block + left, (columns + BLOCK - 1) // BLOCK)
        whole = tl.minimum(end, columns // BLOCK)
        if MODE == ROWS:
            rows = ()
            for t in tl.static_range(TASKS):
                rows = rows + (tl.load(row + 3 + t) if LISTED else base + t * row_bytes,)
            for i in tl.range(block, whole, num_stages=STAGES):
                sums = add_rows(sums, rows, i * BLOCK, columns, TASKS, DTYPE, ALIGNED, False, BLOCK)
            for i in range(whole, end):
                sums = add_rows(sums, rows, i * BLOCK, columns, TASKS, DTYPE, ALIGNED, True, BLOCK)
        else:
            x = addresses(base, row_bytes, row, x_first, num_tasks, LISTED, COUNT)
            y = addresses(base, row_bytes, row, y_first, num_tasks, LISTED, COUNT)
            if SCALED:
                for i in range(block, end):
                    sums = add_scaled(sums, x, y, i * BLOCK, columns, DTYPE, SAME, BLOCK)
            elif MODE == FLOAT32:
                for i in tl.range(block, whole, num_stages=STAGES):
                    sums, x_top, y_top = add_float32(
                        sums, x_top, y_top, x, y, i * BLOCK, columns, DTYPE, ALIGNED, False, SAME, BLOCK
                    )
                for i in range(whole, end):
                    sums, x_top, y_top = add_float32(
                        sums, x_top, y_top, x, y, i * BLOCK, columns, DTYPE, ALIGNED, True, SAME, BLOCK
                    )
            else:
                for i in tl.range(block, whole, num_stages=STAGES):
                    sums = add_float64(sums, x, y, i * BLOCK, columns, DTYPE, ALIGNED, False, SAME, DOT, BLOCK)
                for i in range(whole, end):
                    sums = add_float64(sums, x, y, i * BLOCK, columns, DTYPE, ALIGNED, True, SAME, DOT, BLOCK)
        left -= end - block
        piece += 1
        block = end * 0
    return sums, x_top, y_top


@triton.jit(
    do_not_specialize=["base", "row_bytes", "columns", "num_tasks", "blocks_per_slot"],
    do_not_specialize_on_alignment=["table", "slots"],
)
def slot_sums(
    partials,
    base: tl.int64,
    row_bytes: tl.int64,
    columns: tl.int64,
    num_tasks,
    table,
    slots,
    blocks_per_slot: tl.int64,
    LISTED: tl.constexpr,
    TASKS: tl.constexpr,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    DOT: tl.constexpr,
    MIRRORED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write each slot's products [T, T] in float64: G's upper triangle, or where MIRRORED E with E + E^T = 2 G.

    Program: (slot, square); with more than 64 tasks there are three squares: upper left, upper right, lower right. A
    FLOAT32 slot whose values are out of the range of its products is computed again with scaled rows.
    """
    x_first = tl.program_id(1) // 2 * SIDE
    y_first = (tl.program_id(1) + 1) // 2 * SIDE
    sums, x_top, y_top = slot_total(
        base,
        row_bytes,
        columns,
        num_tasks,
        table,
        slots,
        blocks_per_slot,
        x_first,
        y_first,
        LISTED,
        TASKS,
        DTYPE,
        MODE,
        DOT,
        False,
        ALIGNED,
        BLOCK,
        STAGES,
    )
    if MODE == FLOAT32 and DTYPE != tl.float16:
        fit = fits(x_top)
        if TASKS > SIDE:
            fit = tl.minimum(fit, fits(y_top))
        if fit == 0:
            sums, x_top, y_top = slot_total(
                base,
                row_bytes,
                columns,
                num_tasks,
                table,
                slots,
                blocks_per_slot,
                x_first,
                y_first,
                LISTED,
                TASKS,
                DTYPE,
                MODE,
                DOT,
                True,
                ALIGNED,
                BLOCK,
                STAGES,
            )
    slot = tl.program_id(0).to(tl.int64)
    if LISTED:
        slot = tl.load(slots + slot * 4 + 3)
    out = partials + slot * num_tasks * num_tasks
    if MODE == ROWS:
        for i in tl.static_range(TASKS):
            for j in tl.static_range(i, TASKS):
                product = tl.sum(sums[i * TASKS - i * (i - 1) // 2 + j - i], 0)
                tl.store(out + i * TASKS + j, product)
                if MIRRORED:
                    tl.store(out + j * TASKS + i, product)
    else:
        i = x_first + tl.arange(0, sums.shape[0])[:, None]
        j = y_first + tl.arange(0, sums.shape[1])[None, :]
        mask = (i < num_tasks) & (j < num_tasks)
        tl.store(out + i * num_tasks + j, sums, mask=mask)
        if MIRRORED and TASKS > SIDE:
            if x_first < y_first:
                tl.store(out + j * num_tasks + i, sums, mask=mask)


@triton.jit(do_not_specialize=["num_slots", "num_tasks"])
def sum_slots(
    out,
    partials,
    segments,
    num_slots: tl.int64,
    num_tasks,
    SEGMENTED: tl.constexpr,
    MIRRORED: tl.constexpr,
    SLOTS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Add the slots of each segment in order, and write G and its mirror image; program: (segment, entries)."""
    segment = tl.program_id(0).to(tl.int64)
    first = segment * 0
    last = num_slots
    if SEGMENTED:
        first = tl.load(segments + segment)
        last = tl.load(segments + segment + 1)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    i = entry // num_tasks
    j = entry % num_tasks
    mask = (i < num_tasks) & (i <= j)
    mirrored = j * num_tasks + i
    square = num_tasks.to(tl.int64) * num_tasks
    if tl.max(mask.to(tl.int32), 0) > 0:
        total = tl.zeros([SLOTS, ENTRIES], tl.float64)
        for begin in range(first, last, SLOTS):
            slot = begin + tl.arange(0, SLOTS)
            inside = (slot < last)[:, None] & mask[None, :]
            row = partials + (slot * square)[:, None]
            value = tl.load(row + entry[None, :], mask=inside, other=0.0)
            if MIRRORED:
                value += tl.load(row + mirrored[None, :], mask=inside, other=0.0)
            total += value
        sums = tl.sum(total, 0)
        if MIRRORED:
            sums *= 0.5
        tl.store(out + segment * square + entry, sums, mask=mask)
        tl.store(out + segment * square + mirrored, sums, mask=mask)
