# SPDX-License-Identifier: MIT
"""The methods that work coordinate by coordinate, written out as in the papers."""

from functools import lru_cache

import torch

import gradsurgery
from inputs import DEVICE, UNIT_ROUNDOFF

TASKS = (1, 2, 3, 8, 64)
# A seed and a step of more than 32 bits.
SEED, STEP = (7 << 32) + 5, (3 << 32) + 9
METHODS = {
    "graddrop": {"seed": SEED},
    "graddrop, leaky": {"seed": SEED, "leak": "some"},
    "trimmed_mean": {},
    "trimmed_mean, 3": {"num_trimmed": 3},
    "coordinate_median": {},
}


def make(case, tasks):
    """Return the method of a case of ``METHODS``, for this number of tasks."""
    options = dict(METHODS[case])
    if options.get("leak") == "some":
        options["leak"] = leaks(tasks).tolist()
    method = gradsurgery.methods.get(case.split(",")[0], **options)
    if "graddrop" in case:
        method.load_state_dict({"seed": SEED, "step": torch.tensor(STEP, device="cpu")})
    return method


def leaks(tasks):
    return torch.arange(tasks, dtype=torch.float64, device=DEVICE) % 5 / 4


@lru_cache(maxsize=1 << 16)
def philox(block, seed, step):
    """Return the four random 32-bit words of a block of four coordinates."""
    return philox_of([step % 2**32, step >> 32, 2**31 + (block >> 32), block % 2**32], seed)


def philox_of(counter, seed):
    """Philox4x32-10 in Python's integers."""
    key = [seed % 2**32, seed >> 32]
    for _ in range(10):
        high, low = divmod(counter[0] * 0xD2511F53, 2**32)
        high2, low2 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = [high2 ^ counter[1] ^ key[0], low2, high ^ counter[3] ^ key[1], low]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def uniforms(count, seed=SEED, step=STEP):
    words = [word for block in range((count + 3) // 4) for word in philox(block, seed, step)]
    return (torch.tensor(words[:count], dtype=torch.float64, device=DEVICE) + 0.5) / 2**32


def explicit(case, rows, u=None):
    """Return the direction by the papers' formulas in float64, and the sum of its terms' magnitudes."""
    wide = rows.double()
    if "graddrop" not in case:
        middle = (len(rows) - 1) // 2
        trimmed = {"trimmed_mean": min(1, middle), "trimmed_mean, 3": min(3, middle)}.get(case, middle)
        kept = wide.sort(0).values[trimmed : len(rows) - trimmed]
        return kept.mean(0), kept.abs().sum(0)
    u = uniforms(rows.shape[1]) if u is None else u
    purity = (1 + wide.sum(0) / wide.abs().sum(0)) / 2
    kept = ((purity > u) & (wide > 0)) | ((purity < u) & (wide < 0))
    leak = leaks(len(rows))[:, None] if "leaky" in case else 0
    return ((leak + (1 - leak) * kept) * wide).sum(0), wide.abs().sum(0)


def assert_direction(got, case, rows, before=0):
    """Assert that the direction differs from the float64 result by one rounding at most."""
    exact, magnitude = explicit(case, rows)
    roundoff = UNIT_ROUNDOFF[got.dtype]
    smallest = torch.finfo(got.dtype).smallest_normal * roundoff
    tolerance = (1 + 1e-3) * roundoff * (exact + before).abs() + 1e-14 * magnitude + 2 * smallest
    assert got.dtype == rows.dtype
    assert ((got.double() - exact - before).abs() <= tolerance).all()


def direction(case, rows, **options):
    return gradsurgery.aggregate(rows, make(case, len(rows)), **options)
