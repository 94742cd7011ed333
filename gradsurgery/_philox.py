# SPDX-License-Identifier: MIT
"""The random numbers of (seed, step), in plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def philox_words(rows: Tensor, count: int, seed: int, step: Tensor) -> Tensor:
    """Return ``count`` 32-bit words for each row: Philox4x32-10 with key ``seed`` and counter (step, row, block)."""
    mask = 0xFFFFFFFF
    blocks = torch.arange((count + 3) // 4, device=rows.device)
    shape = (len(rows), len(blocks))
    counter = [
        (step & mask).expand(shape),
        ((step >> 32) & mask).expand(shape),
        rows[:, None].expand(shape),
        blocks.expand(shape),
    ]
    key = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        # The products wrap modulo 2^64 as signed integers; both halves are still the right bits.
        product0, product1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            ((product1 >> 32) & mask) ^ counter[1] ^ key[0],
            product1 & mask,
            ((product0 >> 32) & mask) ^ counter[3] ^ key[1],
            product0 & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return torch.stack(counter, dim=-1).flatten(1)
