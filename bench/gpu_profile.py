# SPDX-License-Identifier: MIT
"""Run the cases that fall short of their targets once each, for a profiler.

``bench/gpu.sh --profile`` runs this under ncu, which writes a row for each kernel to a CSV. The kernels of a case are
in a range, whose name is that of the case in the JSON that this writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .gpu_cases import Bench, columns, prepare
from .gpu_report import RESULTS, store
from .gpu_timing import OURS, Spec
from .origin import provenance

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
SOLVES += [(f"{name} weights", 8) for name in ("aligned_mtl", "fairgrad", "upgrad")]


@dataclass
class Range:
    """A case, under the name of its kernels' range."""

    name: str
    spec: Spec

    @classmethod
    def of(cls, spec: Spec) -> Range:
        """Name a case."""
        return cls(f"{spec.stage} {spec.form} T={spec.tasks} {spec.dtype} J={spec.bytes / 1e6:.0f} MB", spec)


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
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    cases = [Range.of(spec) for spec in specs(options.scale)]
    store(options.output, "gpu-profile", "bench/gpu.sh --profile", provenance(device), cases, [])
    bench = Bench.create(device, 0, max(case.spec.bytes for case in cases) + (1 << 20))
    for case in cases:
        call = prepare(bench, case.spec).calls[OURS][0]
        call()
        if device.type == "cpu":
            continue
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile(), torch.cuda.nvtx.range(case.name):
            call()
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
