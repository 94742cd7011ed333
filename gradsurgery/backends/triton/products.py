# SPDX-License-Identifier: MIT
"""Sums of products over a block of columns, in three arithmetics.

ROWS takes T as it is: products and sums lane by lane in float64, one vector of sums for each pair of tasks. FLOAT64 and
FLOAT32 pad T to a power of two of at least 16 and use matrix instructions, for a square x y^T of at most 64 x 64
products; x and y are the same rows unless T is larger.
"""

import os

import triton
import triton.language as tl

ROWS, FLOAT64, FLOAT32 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# The side of the largest square.
SIDE = tl.constexpr(64)
# Columns of one matrix instruction of 16-bit formats: its float32 sum may be truncated, the sums of sums are rounded.
STEP = tl.constexpr(16)
# Rows whose largest magnitude is within these bounds, or 0, lose no float32 product that counts, and overflow nowhere.
SMALL, LARGE = tl.constexpr(2.0**-35), tl.constexpr(2.0**55)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def mask_of(exists, offsets, columns, TAIL: tl.constexpr):
    """Return which columns of a row to read: those that there are, if it ``exists``."""
    if INTERPRETED:  # the interpreter cannot broadcast a truth value
        return offsets < tl.where(exists, columns, 0)
    mask = exists
    if TAIL:
        mask = mask & (offsets < columns)
    return mask


@triton.jit
def add_rows(
    sums,
    rows,
    begin,
    columns,
    TASKS: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the products of columns begin .. begin + BLOCK in ROWS; ``rows`` holds T addresses."""
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // VECTOR
    if ALIGNED:
        offsets = begin + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    else:
        # Neighbours in different lanes, so that these read together what they cannot read as vectors.
        offsets = begin + tl.arange(0, LANES)[:, None] + tl.arange(0, VECTOR)[None, :] * LANES
    x = ()
    for t in tl.static_range(TASKS):
        mask = mask_of(rows[t] != 0, offsets, columns, TAIL)
        pointer = rows[t].to(tl.pointer_type(DTYPE))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        x = x + (tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float64),)
    added = ()
    for i in tl.static_range(TASKS):
        for j in tl.static_range(i, TASKS):
            added = added + (sums[i * TASKS - i * (i - 1) // 2 + j - i] + tl.sum(x[i] * x[j], 1),)
    return added


@triton.jit
def load(
    rows,
    begin,
    columns,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return columns begin .. begin + WIDTH of the rows at these addresses; 0 where there is none."""
    pointers = rows.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    offsets = begin + tl.arange(0, WIDTH)
    mask = (rows != 0)[:, None]
    if TAIL:
        mask = mask & (offsets < columns)[None, :]
    return tl.load(pointers[:, None] + offsets[None, :], mask=mask, other=0.0)


@triton.jit
def add_float64(
    total,
    x_rows,
    y_rows,
    begin,
    columns,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAIL: tl.constexpr,
    SAME: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the products of columns begin .. begin + BLOCK in FLOAT64, by matrix instructions if DOT."""
    x = load(x_rows, begin, columns, DTYPE, ALIGNED, TAIL, BLOCK).to(tl.float64)
    y = x
    if not SAME:
        y = load(y_rows, begin, columns, DTYPE, ALIGNED, TAIL, BLOCK).to(tl.float64)
    if DOT:
        return tl.dot(x, tl.trans(y), total, out_dtype=tl.float64)
    else:
        return total + tl.sum(x[:, None, :] * y[None, :, :], 2)


@triton.jit
def add_float32(
    total,
    x_top,
    y_top,
    x_rows,
    y_rows,
    begin,
    columns,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAIL: tl.constexpr,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the products of columns begin .. begin + BLOCK in FLOAT32, and raise the largest magnitudes' bits."""
    xs, ys = (), ()
    for k in tl.static_range(BLOCK // STEP):
        xs = xs + (load(x_rows, begin + k * STEP, columns, DTYPE, ALIGNED, TAIL, STEP),)
        if not SAME:
            ys = ys + (load(y_rows, begin + k * STEP, columns, DTYPE, ALIGNED, TAIL, STEP),)
    chain = tl.zeros(total.shape, tl.float32)
    for k in tl.static_range(BLOCK // STEP):
        x_top = raised(x_top, xs[k])
        product = chain
        if SAME:
            product = square(xs[k])
        else:
            product = cross(xs[k], ys[k])
            y_top = raised(y_top, ys[k])
        # As a multiple and an addition: "dot(x, y) + c" would go into the instruction's own sum.
        chain = tl.fma(product, 1.0, chain)
    return total + chain.to(tl.float64), x_top, y_top


@triton.jit
def add_scaled(total, x_rows, y_rows, begin, columns, DTYPE: tl.constexpr, SAME: tl.constexpr, BLOCK: tl.constexpr):
    """Add the same products for values of any scale: powers of two bring each row's largest near 1 and back."""
    for k in range(BLOCK // STEP):
        x, x_scale = scaled(load(x_rows, begin + k * STEP, columns, DTYPE, False, True, STEP))
        if SAME:
            product = square(x).to(tl.float64) * x_scale[:, None] * x_scale[None, :]
        else:
            y, y_scale = scaled(load(y_rows, begin + k * STEP, columns, DTYPE, False, True, STEP))
            product = cross(x, y).to(tl.float64) * x_scale[:, None] * y_scale[None, :]
        total += product
    return total


@triton.jit
def scaled(x):
    """Return the rows divided by powers of two, and these."""
    exponent = tl.max(tl.abs(x.to(tl.float32)), 1).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    return rounded(x.to(tl.float32) * inverse[:, None], x.dtype), scale.to(tl.float64)


@triton.jit
def raised(top, x):
    """Return the larger magnitudes' bits, which as integers have the magnitudes' order; NaN is the largest."""
    if x.dtype == tl.float32:
        return tl.maximum(top, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    else:
        return tl.maximum(top, x.to(tl.int16, bitcast=True) & 0x7FFF)


@triton.jit
def fits(top):
    """Return 1 if every row is within the bounds of FLOAT32, else 0."""
    bits = tl.max(top.to(tl.int32), 1)
    if top.dtype == tl.int16:
        bits = bits << 16
    largest = bits.to(tl.float32, bitcast=True)
    return tl.min(((bits == 0) | ((largest >= SMALL) & (largest <= LARGE))).to(tl.int32), 0)


@triton.jit
def square(x):
    """Return E [T, T] with E + E^T = 2 x x^T over one step, products exact to 2^-25, sums in float32."""
    if x.dtype == tl.float32:
        a, b, c = split(x)
        mixed = dot(a, b, dot(a, c))
        return dot(a, a, dot(b, b, mixed + mixed))
    else:
        return dot(x, x)


@triton.jit
def cross(x, y):
    """Return x y^T over one step, as ``square`` does."""
    if x.dtype == tl.float32:
        a, b, c = split(x)
        d, e, f = split(y)
        small = dot(b, e, dot(a, f, dot(c, d)))
        return dot(a, d, dot(a, e, dot(b, d, small)))
    else:
        return dot(x, y)


@triton.jit
def split(x):
    """Return three bfloat16 that add up to a float32; NaN where it is not finite."""
    a = rounded(x, tl.bfloat16)
    rest = x - a.to(tl.float32)
    b = rounded(rest, tl.bfloat16)
    return a, b, rounded(rest - b.to(tl.float32), tl.bfloat16)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Return float32 rounded to nearest, ties to even."""
    # The interpreter truncates to bfloat16.
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x - x == 0, nearest.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def dot(x, y, acc=None):
    """Return x y^T + acc of 16-bit floats in float32."""
    # The interpreter multiplies the bits of bfloat16 as integers.
    if INTERPRETED:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, tl.trans(y), acc)
