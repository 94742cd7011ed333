# SPDX-License-Identifier: MIT
"""The code that Triton compiles for GPUs that this machine does not have: see triton_compile.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import USABLE, WHOLE, on_cpu

pytestmark = [on_cpu, pytest.mark.skipif("triton" not in USABLE, reason="needs Triton")]

TOOL = Path(__file__).with_name("triton_compile.py")
STREAMING = ("slot_sums", "sum_slots", "weighted_sums")
SOLVERS = ("exact", "frank_wolfe", "cone_projection", "cagrad", "fairgrad", "from_cosines", "aligned_mtl")
ROWS, FLOAT64, FLOAT32 = ("constexpr[0]", "constexpr[1]", "constexpr[2]")


def compiled(*arguments: str) -> tuple[list[dict], int]:
    """Return the kernels, and how many more are compiled for other numbers of columns, blocks and parameters."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, TOOL, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return lines[1:], lines[0]["recompiled"]


def count(kernel: dict, *prefixes: str) -> int:
    return sum(n for name, n in kernel["instructions"].items() if name.startswith(prefixes))


def named(kernel: dict) -> str:
    return f"{kernel['kernel']} {kernel['constants']} {kernel.get('registers')} registers"


def check_common(kernels: list[dict], matrix: str) -> None:
    shapes = {(k["constants"]["MODE"], int(k["constants"]["TASKS"])) for k in kernels if k["kernel"] == "slot_sums"}
    assert {(ROWS, 8), (FLOAT64, 16), (FLOAT32, 16)} <= shapes
    for kernel in kernels:
        constants, name = kernel["constants"], named(kernel)
        if kernel["kernel"] in STREAMING:
            # A little local memory, which the hot loops do not touch.
            assert kernel["local"] <= 32, name
        if kernel["kernel"] == "slot_sums":
            matrices = constants["MODE"] == FLOAT32 or (constants["MODE"] == FLOAT64 and constants["DOT"] == "True")
            assert (count(kernel, *matrix.split()) > 0) == matrices, name


# With GRADSURGERY_TEST_WHOLE: every padded number of tasks, for other GPUs too.
@pytest.mark.parametrize("architecture", ["80", "90", "100"] if WHOLE else ["90"])
def test_nvidia(architecture):
    kernels, recompiled = compiled("cuda", architecture, *([] if WHOLE else ["--small"]))
    assert recompiled == 0
    check_common(kernels, "HMMA HGMMA UTCHMMA DMMA")
    for kernel in kernels:
        constants, name = kernel["constants"], named(kernel)
        tasks = int(constants.get("TASKS", 1))
        # combine reads rows of 16-bit numbers 8 bytes at a time, in more programs, which was measured to be as fast.
        eight = kernel["kernel"] == "weighted_sums" and constants["DTYPE"] in ("bf16", "fp16")
        if kernel["kernel"] in ("slot_sums", "weighted_sums") and constants["ALIGNED"] == "True" and not eight:
            assert kernel["hot loops"] == 1, name
            assert kernel["spills in hot loops"] == 0, name
        # Each lane has its own sum for each pair of tasks; only the sum over lanes at the end takes 5 exchanges of two
        # words.
        if kernel["kernel"] == "slot_sums" and constants["MODE"] == ROWS:
            assert count(kernel, "SHFL") <= 10 * tasks * (tasks + 1) // 2, name
        # Lanes must have the same bits of the values that they decide by: see weights._SOLVER.
        if kernel["kernel"] not in STREAMING:
            assert constants["enable_fp_fusion"] == "False", name
        # Solvers hold up to three [T, T] matrices in registers; cos() keeps an array in local memory for large angles.
        if kernel["kernel"] not in SOLVERS or tasks <= 32:
            assert kernel["local"] <= (48 if kernel["kernel"] == "random" else 32), name
        # Triton's own layout may give every warp the same tiles. The code has the arithmetic for whole blocks, for the
        # last block, and, for bfloat16, for one step with scaled rows.
        if kernel["kernel"] == "slot_sums" and constants["DTYPE"] == "bf16" and architecture == "80" and tasks >= 16:
            side, block, warps = min(tasks, 64), int(constants["BLOCK"]), int(constants["num_warps"])
            tiles = side // 16 * (side // 8) // warps
            assert count(kernel, "HMMA") <= tiles * (2 * block // 16 + 1), name


def test_amd():
    kernels, recompiled = compiled("hip", "gfx942", "--small")
    assert recompiled == 0
    check_common(kernels, "v_mfma")
