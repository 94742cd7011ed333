# SPDX-License-Identifier: MIT
"""Task gradients that break careless code, and the device that the tests put them on."""

import os

import torch
from torch import Tensor

DEVICE = os.environ.get("GRADSURGERY_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)

TASKS = (1, 2, 3, 5, 8, 17, 64)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The largest error of G_ij relative to |g_i| |g_j|, as gradsurgery.gram promises it.
GRAM_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def normal(tasks: int, columns: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    # The same numbers on every device.
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, columns, generator=generator, dtype=torch.float64, device="cpu")
    return rows.to(DEVICE, dtype)


def hostile(tasks: int) -> dict[str, Tensor]:
    """Finite float64 gradients [T, N] by name."""
    base = normal(tasks, 37)
    zero_row, duplicate, opposite = base.clone(), base.clone(), base.clone()
    zero_row[0] = 0
    duplicate[-1] = duplicate[0]
    opposite[-1] = -opposite[0]
    mixed = base * torch.logspace(-6, 6, tasks, dtype=torch.float64)[:, None]
    direction = torch.nn.functional.normalize(normal(1, 37, seed=5))
    across = base - (base @ direction.mT) * direction
    return {
        "normal": base,
        "zero": torch.zeros_like(base),
        "zero row": zero_row,
        "duplicate": duplicate,
        "opposite": opposite,
        "parallel": torch.arange(1, tasks + 1, dtype=torch.float64)[:, None] * base[:1],
        "nearly parallel": direction + 1e-4 * across,
        "rank deficient": normal(tasks, 2) @ normal(2, 37, seed=2),
        "more tasks than parameters": normal(tasks, 3),
        "one parameter": normal(tasks, 1),
        "tiny": base * 1e-20,
        "huge": base * 1e20,
        "mixed scales": mixed,
        "conflicting": base - 2 * base.mean(0, keepdim=True),
    }


HOSTILE = tuple(hostile(2))


def exact_gram(rows: Tensor) -> Tensor:
    """G in float64 with exact sums of float64 products, one pair of rows at a time."""
    import math

    wide = rows.double().tolist()
    return torch.tensor(
        [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in wide] for x in wide], dtype=torch.float64
    )


def near_copies(tasks: int, seed: int, columns: int = 200, distance: float = 1e-7) -> torch.Tensor:
    """Rows of which most copy an earlier row, with either sign, and add ``distance`` times a row of their own."""
    rows = normal(tasks, columns, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for i in range(1, tasks):
        copied, negative, source = torch.rand(3, generator=generator, device="cpu").tolist()
        if copied < 0.6:
            rows[i] = rows[int(source * i)] * (-1 if negative < 0.2 else 1) + distance * rows[i]
    return rows
