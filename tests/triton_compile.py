# SPDX-License-Identifier: MIT
"""Compile the Triton kernels ahead of time, without a GPU, exactly as the backend would launch them.

``python -m triton_compile cuda 90`` in this folder prints one JSON line for each kernel: what it is, its registers,
local memory and instructions. A driver that only knows the target stands in for the GPU's, and launches only compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gradsurgery._gradients import parse
from gradsurgery.backends.triton import launch

WARP = {"cuda": 32, "hip": 64}


class Driver:
    """The part of a driver that compilation asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Compile what is launched, and keep it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.kernels: dict[tuple[str, str], object] = {}
        driver.set_active(Driver(target))
        JITFunction.__getitem__ = lambda function, grid: lambda *args, **options: self.add(function, args, options)

    def add(self, function: JITFunction, args: tuple, options: dict) -> None:
        constants = {k: str(v) for k, v in options.items()}
        kernel = function.warmup(*args, grid=(1,), **options)
        self.kernels[function.__name__, json.dumps(constants)] = kernel


def launch_all(small: bool) -> None:
    """Launch every arithmetic, padded number of tasks and dtype once, in list form."""
    for fast in (True, False):
        launch.fast_float64 = lambda device, fast=fast: fast
        for tasks in (2, 8, 9, 17) if small else (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 65):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                if launch.arithmetic_of(dtype, tasks, None)[0] == "rows" and tasks < 8 and dtype is not torch.float32:
                    continue
                launch.gram(parse([[torch.zeros(64, dtype=dtype)]] * tasks, None), torch.zeros(tasks, tasks).double())
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        grads = parse([[torch.zeros(64, dtype=dtype)]] * 4, None)
        launch.combine(grads, torch.zeros(4).double(), [torch.zeros(64, dtype=dtype)], False)
    # The flat form, and numbers of columns and tasks that a compiler may take for special.
    for columns in (16, 1001):
        flat = parse(torch.zeros(8, columns), None)
        launch.gram(flat, torch.zeros(8, 8).double())
        launch.combine(flat, torch.zeros(8).double(), torch.zeros(columns), True)
    for tasks in (8, 20) if small else (1, 8, 16, 33, 65):
        step = torch.zeros((), dtype=torch.int64)
        gram, out = torch.eye(tasks).double(), torch.zeros(tasks).double()
        launch.task_order(0, step, torch.zeros(tasks, tasks, dtype=torch.int64))
        launch.pcgrad(gram, None, 0, step, False, False, out)
        launch.min_norm(gram, True, 1, 0.0, out)
        launch.min_norm(gram, False, 1, 0.0, out)
        launch.gradnorm([out] * 4, 1.5, 0.025, out)
        launch.gradnorm_step(gram, out, 1.5, 0.025, (out, out), out)


def describe(kernel, target: GPUTarget) -> dict[str, object]:
    """Return registers, bytes of local memory and the instructions of a kernel."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        instructions = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)
        spills = sum(int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", text))
        return {"local": spills, "instructions": Counter(instructions)}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", sass)
    return {"registers": int(registers), "local": int(stack), "instructions": Counter(instructions)}


def main() -> None:
    name, architecture = sys.argv[1], sys.argv[2]
    target = GPUTarget(name, int(architecture) if architecture.isdigit() else architecture, WARP[name])
    compiler = Compiler(target)
    launch_all(small="--small" in sys.argv)
    for (kernel, constants), compiled in compiler.kernels.items():
        row = {"kernel": kernel, "constants": json.loads(constants), "shared": compiled.metadata.shared}
        print(json.dumps(row | describe(compiled, target)))


if __name__ == "__main__":
    main()
