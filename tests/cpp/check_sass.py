# SPDX-License-Identifier: MIT
"""Check what nvcc made of the kernels' hot loops, from objects that hold machine code.

    python tests/cpp/check_sass.py OBJECT...

A hot loop is an innermost loop with the kernel's arithmetic in it. It must hold the matrix instruction that is planned
for the kernel, read 16 bytes at a time, and never touch local memory, which is where registers spill to.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

KERNEL = re.compile(
    r"(direct|tiles|staged|combine)_kernelI(d|f|NS0_8bfloat16E|NS0_7float16E)(?:Li(\d+)E)?(?:Lb([01])E)?"
)
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,5})\*/\s+(.*?);")
HMMA = {
    "f": r"HMMA\.1688\.F32\.TF32",
    "NS0_8bfloat16E": r"HMMA\.16816\.F32\.BF16",
    "NS0_7float16E": r"HMMA\.16816\.F32 ",
}
LOADS = {
    "direct": r"LDG\.E\S*\.128",
    "tiles": r"LDG\.E\S*\.128",
    "staged": r"LDSM\.16\.M88\.4|LDS\.128",
    "combine": r"LDG\.E\S*\.128",
}


@dataclass
class Kernel:
    """One kernel's name and instructions by address."""

    name: str
    code: list[tuple[int, str]]

    def loops(self) -> list[list[str]]:
        """Return the innermost loops: the stretches of code before a jump back that hold no other one."""
        spans = []
        for address, text in self.code:
            target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                spans.append((int(target[1], 16), address))
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return [[text for address, text in self.code if begin <= address <= end] for begin, end in inner]


def kernels_of(path: Path, cuobjdump: str) -> list[Kernel]:
    """Return the kernels in an object."""
    listing = subprocess.run([cuobjdump, "--dump-sass", str(path)], check=True, capture_output=True, text=True).stdout
    kernels = []
    for part in listing.split("Function : ")[1:]:
        name, body = part.split("\n", 1)
        code = [(int(m[1], 16), m[2]) for m in map(INSTRUCTION.match, body.split("\n")) if m]
        kernels.append(Kernel(name.strip(), code))
    return kernels


def faults_of(kernel: Kernel) -> list[str]:
    """Return what is wrong with a kernel's hot loops; none for kernels without a plan."""
    match = KERNEL.search(kernel.name)
    if not match:
        return []
    kind, dtype, _, is_double = match.groups()
    arithmetic = r"DMMA\.(884|8x8x4)" if is_double == "1" else HMMA[dtype] if is_double == "0" else "DFMA"
    hot = [loop for loop in kernel.loops() if any(re.search(arithmetic, text) for text in loop)]
    faults = []
    if not hot:
        faults.append(f"no loop with {arithmetic}")
    elif not any(re.search(LOADS[kind], text) for loop in hot for text in loop):
        faults.append(f"no hot loop reads by {LOADS[kind]}")
    if kind == "staged" and not any(re.search(r"LDGSTS\.E\S*\.128", text) for _, text in kernel.code):
        faults.append("no copy of 16 bytes to shared memory")
    if any(re.search(r"\b(LDL|STL)\b", text) for loop in hot for text in loop):
        faults.append("a hot loop spills registers")
    return faults


def main() -> int:
    """Print the faults of all objects; return 1 if there are any, or nothing was checked."""
    cuobjdump = shutil.which("cuobjdump") or find_in_triton()
    checked, faults = 0, []
    for path in map(Path, sys.argv[1:]):
        for kernel in kernels_of(path, cuobjdump):
            checked += KERNEL.search(kernel.name) is not None
            faults += [f"{path.name} {kernel.name}: {fault}" for fault in faults_of(kernel)]
    print(*faults, f"checked the hot loops of {checked} kernels", sep="\n")
    return 1 if faults or not checked else 0


def find_in_triton() -> str:
    """Return the cuobjdump that triton brings along."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


if __name__ == "__main__":
    sys.exit(main())
