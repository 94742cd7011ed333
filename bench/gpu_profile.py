# SPDX-License-Identifier: MIT
"""Run the cases that fall short of their targets once each, for a profiler.

``bench/gpu.sh --profile`` runs this under ncu, which prints the numbers of the kernels below each case's line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from .gpu_cases import Bench, columns, prepare
from .gpu_timing import OURS, Spec

# Stage, form, T, MB of J, dtype.
CASES = [
    ("gram", "flat", 5, 300, "float32"),
    ("gram", "flat", 8, 300, "float32"),
    ("gram", "flat", 32, 300, "float32"),
    ("gram", "flat", 64, 300, "float32"),
    ("gram", "flat", 128, 300, "float32"),
    ("gram", "flat", 5, 300, "bfloat16"),
    ("gram", "flat", 32, 300, "bfloat16"),
    ("gram", "flat", 64, 300, "bfloat16"),
    ("gram", "flat", 128, 300, "bfloat16"),
    ("gram", "misaligned", 8, 300, "bfloat16"),
    ("gram", "misaligned", 32, 300, "bfloat16"),
    ("combine", "flat", 5, 300, "bfloat16"),
    ("combine", "flat", 64, 300, "float32"),
    ("combine", "list", 32, 28, "bfloat16"),
    ("chain", "flat", 8, 2, "float32"),
    ("chain", "flat", 8, 28, "float32"),
]
SOLVES = [("pcgrad_weights", 64), ("min_norm_weights", 64)]


def specs(scale: float) -> Iterator[Spec]:
    """Yield what is run, with ``scale`` times the columns."""
    for stage, form, tasks, megabytes, dtype in CASES:
        yield Spec(stage, form, tasks, columns(scale * megabytes * 1e6, tasks, dtype), dtype, "cold")
    for stage, tasks in SOLVES:
        yield Spec(stage, "solve", tasks, None, "float64", "cold")


def main() -> None:
    """Run each case twice, the second time with the profiler on."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_profile", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try this script out")
    parser.add_argument("--scale", type=float, default=1, help="of the number of columns")
    options = parser.parse_args()
    device = torch.device(options.device)
    cases = list(specs(options.scale))
    bench = Bench.create(device, 0, max(spec.bytes for spec in cases) + (1 << 20))
    for spec in cases:
        call = prepare(bench, spec).calls[OURS][0]
        call()
        print(f"== {spec.stage} {spec.form} T={spec.tasks} {spec.dtype} J={spec.bytes / 1e6:.0f} MB", flush=True)
        if device.type == "cpu":
            call()
            continue
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            call()
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
