# SPDX-License-Identifier: MIT
"""Compile the Triton kernels ahead of time, without a GPU, exactly as the backend would launch them.

``python -m triton_compile cuda 90`` in this folder prints one JSON line for each kernel: what it is, its registers and
local memory, and, if it reads rows, its instructions. A driver that only knows the target replaces the GPU's, and
launches only compile.
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

from cpp.check_sass import READ, SPILL, kernels_of
from gradsurgery._gradients import parse
from gradsurgery.backends.triton import launch, weights

WARP = {"cuda": 32, "hip": 64}
READS_ROWS = ("slot_sums", "weighted_sums")


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


def launch_all(target: GPUTarget, small: bool) -> None:
    """Launch every arithmetic, padded number of tasks and dtype once, in list form."""
    weights._MAX_WARPS = 1024 // target.warp_size
    torch.version.hip = target.backend if target.backend == "hip" else None
    torch.cuda.get_device_capability = lambda device: divmod(target.arch, 10)
    on_device = launch.float64_dot
    launch.float64_dot = lambda device: on_device(torch.device("cuda"))
    for fast in (True, False):
        launch.fast_float64 = lambda device, fast=fast: fast
        for tasks in (2, 8, 9) if small else (1, 2, 5, 8, 9, 17, 33, 65):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                if launch.arithmetic_of(dtype, tasks, None)[0] == "rows" and tasks < 8 and dtype is not torch.float32:
                    continue
                launch.gram(parse([[torch.zeros(64, dtype=dtype)]] * tasks, None), torch.zeros(tasks, tasks).double())
    # Rows that are not aligned.
    launch.fast_float64 = lambda device: True
    for dtype in (torch.float32, torch.bfloat16):
        launch.gram(parse(torch.zeros(5, 1001, dtype=dtype), None), torch.zeros(5, 5).double())
    launch.fast_float64 = lambda device: False
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        grads = parse([[torch.zeros(64, dtype=dtype)]] * 4, None)
        launch.combine(grads, torch.zeros(4).double(), [torch.zeros(64, dtype=dtype)], False)
    # The flat form, and numbers of columns and tasks for which a compiler may specialise the code.
    for columns in (16, 1001):
        flat = parse(torch.zeros(8, columns), None)
        launch.gram(flat, torch.zeros(8, 8).double())
        launch.combine(flat, torch.zeros(8).double(), torch.zeros(columns), True)
    for tasks in (8,) if small else (8, 33):
        step = torch.zeros((), dtype=torch.int64)
        gram, out = torch.eye(tasks).double(), torch.zeros(tasks).double()
        weights.task_order(0, step, torch.zeros(tasks, tasks, dtype=torch.int64))
        weights.random(gram, 0, step, out)
        weights.simplex_steps(gram, 0.1, 0.5, 2, out)
        weights.pcgrad(gram, None, 0, step, False, False, out)
        weights.min_norm(gram, True, 1, 0.0, out)
        weights.min_norm(gram, False, 1, 0.0, out)
        weights.gradnorm([out] * 4, 1.5, 0.025, out)
        weights.gradnorm_step(gram, out, 1.5, 0.025, (out, out), out)
        for method in ("upgrad", "cagrad", "fairgrad", "config", "aligned_mtl_median"):
            weights.weights(gram, method, None, 1.0, 1.0, out)


def recompiled() -> int:
    """Return how many more kernels later calls compile, for other numbers of columns, blocks and parameters."""
    kernels = (launch.gram_kernels.slot_sums, launch.gram_kernels.sum_slots, launch.combine_kernels.weighted_sums)
    counts = []
    for columns, params in ((4000, 1), (64, 2), (1 << 16, 3), (16, 4), (12, 5)):
        flat = parse(torch.zeros(8, columns), None)
        launch.gram(flat, torch.zeros(8, 8).double())
        launch.combine(flat, torch.zeros(8).double(), torch.zeros(columns), False)
        listed = parse([[torch.zeros(16)] * params] * 8, list(range(params)))
        launch.gram(listed, torch.zeros(params, 8, 8).double())
        launch.combine(listed, torch.zeros(params, 8).double(), [torch.zeros(16)] * params, False)
        counts.append(sum(len(kernel.device_caches[0][0]) for kernel in kernels))
    return counts[-1] - counts[0]


def describe(kernel, target: GPUTarget, listed: bool) -> dict[str, object]:
    """Return a kernel's registers, spills and, where ``listed``, instructions.

    Hot loops, found for NVIDIA only, are those that read 16 bytes of rows. To list a kernel's instructions takes half a
    second.
    """
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        instructions = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)
        spills = sum(int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", text))
        return {"local": spills, "instructions": Counter(instructions)}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        options = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([tool, "-res-usage", file.name], **options).stdout
        registers, local = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        if not listed:
            return {"registers": registers, "local": local}
        (listing,) = kernels_of(file.name, tool)
    names = [re.sub(r"^@\S+ ", "", text).split()[0] for _, text in listing.code]
    hot = [loop for loop in listing.inner_loops() if any(re.search(READ, text) for text in loop)]
    spills = sum(bool(re.search(SPILL, text)) for loop in hot for text in loop)
    return {
        "registers": registers,
        "local": local,
        "hot loops": len(hot),
        "spills in hot loops": spills,
        "instructions": Counter(names),
    }


def main() -> None:
    name, architecture = sys.argv[1], sys.argv[2]
    target = GPUTarget(name, int(architecture) if architecture.isdigit() else architecture, WARP[name])
    compiler = Compiler(target)
    launch_all(target, small="--small" in sys.argv)
    print(json.dumps({"recompiled": recompiled()}))
    for (kernel, constants), compiled in compiler.kernels.items():
        row = {"kernel": kernel, "constants": json.loads(constants), "shared": compiled.metadata.shared}
        print(json.dumps(row | describe(compiled, target, kernel in READS_ROWS)))


if __name__ == "__main__":
    main()
