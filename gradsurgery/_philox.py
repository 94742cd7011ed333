# SPDX-License-Identifier: MIT
"""The random numbers of (seed, step), in plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_COORDINATES = 1 << 31
_WEIGHTS = 0xFFFFFFFF
"""The counter's third word is a task's number for visiting orders, 2^31 or more for coordinates and 2^32 - 1 for random
weights, so that no two uses share random words."""


def philox_words(rows: Tensor, count: int, seed: int, step: Tensor) -> Tensor:
    """Return ``count`` 32-bit words for each row: Philox4x32-10 with key ``seed`` and counter (step, row, block)."""
    blocks = torch.arange((count + 3) // 4, device=rows.device)
    shape = (len(rows), len(blocks))
    return _philox(rows[:, None].expand(shape), blocks.expand(shape), seed, step).flatten(1)[:, :count]


def weights_uniforms(count: int, seed: int, step: Tensor) -> Tensor:
    """Return ``count`` numbers (u + 1/2) / 2^32 in (0, 1), u the words of ``philox_words`` for row 2^32 - 1."""
    row = torch.full((1,), _WEIGHTS, device=step.device)
    return _uniform(philox_words(row, count, seed, step)[0])


def coordinate_uniforms(begin: int, count: int, seed: int, step: Tensor, device: torch.device) -> Tensor:
    """Return a number in (0, 1) for each of the coordinates begin, begin + 1, ...: float64 [count].

    u_i = (w + 1/2) / 2^32 with w = word i mod 4 of Philox4x32-10, key ``seed``, counter (step, 2^31 + floor(b / 2^32),
    b mod 2^32), b = floor(i / 4).
    """
    blocks = torch.arange(begin // 4, (begin + count + 3) // 4, device=device)
    words = _philox(_COORDINATES + (blocks >> 32), blocks & _MASK, seed, step).flatten()
    return _uniform(words[begin % 4 : begin % 4 + count])


def _uniform(words: Tensor) -> Tensor:
    return (words.double() + 0.5) / 2**32


def _philox(third: Tensor, fourth: Tensor, seed: int, step: Tensor) -> Tensor:
    """Return the words [..., 4] for counters (step mod 2^32, step / 2^32, third [...], fourth [...])."""
    counter = [(step & _MASK).expand(third.shape), ((step >> 32) & _MASK).expand(third.shape), third, fourth]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(10):
        # The products wrap modulo 2^64 as signed integers; both halves are still the right bits.
        product0, product1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            ((product1 >> 32) & _MASK) ^ counter[1] ^ key[0],
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ counter[3] ^ key[1],
            product0 & _MASK,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    return torch.stack(counter, dim=-1)
