# SPDX-License-Identifier: MIT
"""Check what nvcc made of the kernels, from objects that hold machine code.

    python tests/cpp/check_sass.py OBJECT...

The hot loop is the shortest way round that reads 16 bytes of a row and meets the arithmetic planned for the kernel. It
must exist and not touch local memory, which is where registers spill to, but for two counters and a few constants, and
not even those from the first to the last instruction of the arithmetic, nor in an innermost loop of it. Where a kernel
may start before the one ahead has ended, each way to its first write meets a wait.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

KERNEL = re.compile(
    r"(direct|lanes|tiles|staged|combine|fused)_kernelI(d|f|NS0_8bfloat16E|NS0_7float16E)(?:Li(\d+)E)?(?:Lb([01])E)?"
)
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,5})\*/\s+(.*?);")
HMMA = {
    "f": r"HMMA\.1688\.F32\.TF32",
    "NS0_8bfloat16E": r"HMMA\.16816\.F32\.BF16",
    "NS0_7float16E": r"HMMA\.16816\.F32 ",
}
SHARED_READ = r"LDSM\.16\.M88\.4|LDS\.128"  # if rows pass through shared memory
MOST_TILES = "8"  # with the most tiles of a warp, registers have room for half vectors only
SPILL = r"\b(LDL|STL)\b"
WRITE = r"(@\S+ )?(STG|LDGSTS|ST|RED|REDG|ATOM|ATOMG)\b"  # LDGSTS copies data that may not have been written yet
WAIT = "ACQBULK"  # waits for the kernel ahead, from compute capability 9.0 on
WRITES_AHEAD = "write_table_kernel"  # may write a later piece of a table early: nothing reads it before (entry.cu)
READ = r"\b(LDG\.E\S*\.128|LDGSTS\.E\S*\.128)"


@dataclass
class Kernel:
    """One kernel's name, the compute capability that it is for (90), and its instructions by address."""

    name: str
    capability: int
    code: list[tuple[int, str]]

    def successors(self) -> dict[int, set[int]]:
        """Return the addresses that may follow each address. Threads that part after a BSSY meet at its target."""
        after = {address: following for (address, _), (following, _) in pairwise(self.code)}
        text = dict(self.code)
        follow: dict[int, set[int]] = {}
        meeting: dict[int, frozenset[tuple[str, int]]] = {}  # per address: set barriers, and where their threads meet
        queue = deque([(self.code[0][0], frozenset[tuple[str, int]]())])
        while queue:
            at, barriers = queue.popleft()
            if at in meeting and barriers <= meeting[at]:
                continue
            meeting[at] = barriers = barriers | meeting.get(at, frozenset())
            operation = re.match(r"(@\S+ )?(\w+)\S*(.*?)(B\d+)?,? ?(?:0x([0-9a-f]+))?$", text[at])
            guarded, name, condition, barrier, target = operation.groups() if operation else (None, "", "", None, None)
            follow[at] = {after[at]} if at in after else set()
            if name in ("BRA", "EXIT", "RET", "BSYNC") and not guarded and "P" not in condition:
                follow[at] = set()
            if name in ("BRA", "CALL") and target:
                follow[at].add(int(target, 16))
            elif name == "BSYNC":
                follow[at] |= {place for other, place in barriers if other == barrier}
            elif name == "BSSY":
                barriers = frozenset(b for b in barriers if b[0] != barrier) | {(str(barrier), int(target, 16))}
            queue += [(to, barriers) for to in follow[at]]
        return follow

    def writes_early(self) -> bool:
        """Whether a way from the start leads to a write without a wait."""
        follow, text = self.successors(), dict(self.code)
        ways, seen = [self.code[0][0]], set[int]()
        while ways:
            at = ways.pop()
            if at in seen or re.match(WAIT, text[at]):
                continue
            if re.match(WRITE, text[at]):
                return True
            seen.add(at)
            ways += follow[at]
        return False

    def inner_loops(self) -> list[list[str]]:
        """Return the stretches of code before a jump back that hold no other one."""
        spans = []
        for address, text in self.code:
            target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                spans.append((int(target[1], 16), address))
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return [[text for address, text in self.code if begin <= address <= end] for begin, end in inner]

    def hot_loop(self, patterns: list[str]) -> list[str]:
        """Return the shortest way round that meets an instruction of each pattern; nothing if there is none."""
        follow, goal = self.successors(), (1 << len(patterns)) - 1
        text = dict(self.code)
        marks = {at: sum(1 << k for k, p in enumerate(patterns) if re.search(p, text[at])) for at in follow}
        best: list[str] = []
        for start in (at for at, mark in marks.items() if mark & 1):
            before: dict[tuple[int, int], tuple[int, int] | None] = {(start, marks[start]): None}
            queue = deque(before)
            while queue:
                at, met = queue.popleft()
                if start in follow[at] and met == goal:
                    way = [text[at]]
                    while previous := before[at, met]:
                        at, met = previous
                        way.append(text[at])
                    best = way[::-1] if not best or len(way) < len(best) else best
                    break
                for to in follow[at]:
                    if (to, met | marks[to]) not in before:
                        before[to, met | marks[to]] = (at, met)
                        queue.append((to, met | marks[to]))
        return best


def kernels_of(path: Path, cuobjdump: str) -> list[Kernel]:
    """Return the kernels in an object."""
    listing = subprocess.run([cuobjdump, "--dump-sass", str(path)], check=True, capture_output=True, text=True).stdout
    kernels = []
    for part in listing.split("Function : ")[1:]:
        name, body = part.split("\n", 1)
        code = [(int(m[1], 16), m[2].strip()) for m in map(INSTRUCTION.match, body.split("\n")) if m]
        capability = re.search(r"EF_CUDA_SM(\d+)", body)
        if not capability:
            raise ValueError(f"the listing of {path} must say what {name} is for")
        kernels.append(Kernel(name.strip(), int(capability[1]), code))
    return kernels


def faults_of(kernel: Kernel) -> list[str]:
    """Return what is wrong with a kernel."""
    early = kernel.capability >= 90 and WRITES_AHEAD not in kernel.name and kernel.writes_early()
    return ["it writes before it waited for the kernel ahead"] * early + faults_of_hot_loops(kernel)


def faults_of_hot_loops(kernel: Kernel) -> list[str]:
    """Return what is wrong with a kernel's hot loops; none for kernels without a plan."""
    match = KERNEL.search(kernel.name)
    if not match:
        return []
    kind, dtype, tiles, is_double = match.groups()
    if kind == "fused":
        return faults_of_fused(kernel)
    by_pairs = kind == "lanes" or is_double is None
    arithmetic = "DFMA" if by_pairs else "DMMA" if is_double == "1" else HMMA[dtype]
    hot = kernel.hot_loop([READ, arithmetic])
    if not hot:
        return [f"no loop with {arithmetic} and reads of 16 bytes"]
    shared_read = r"LDS\.(64|128)" if kind == "tiles" and tiles == MOST_TILES else SHARED_READ
    if kind in ("staged", "tiles") and not any(re.search(shared_read, text) for text in hot):
        return [f"the hot loop has no {shared_read}"]
    spills = [i for i, text in enumerate(hot) if re.search(SPILL, text)]
    busy = [i for i, text in enumerate(hot) if re.search(arithmetic, text)]
    inner = [loop for loop in kernel.inner_loops() if any(re.search(arithmetic, text) for text in loop)]
    if any(busy[0] < i < busy[-1] for i in spills) or any(re.search(SPILL, text) for loop in inner for text in loop):
        return ["registers spill amid the arithmetic"]
    stores = sum("STL" in hot[i] for i in spills)
    shifts = kind in ("staged", "tiles") and "Lb1EEEv" in kernel.name
    few = stores <= (5 if shifts else 2) and len(spills) - stores <= (14 if shifts else 7)
    return [] if few else [f"the hot loop spills: {stores} stores, {len(spills) - stores} loads"]


def faults_of_fused(kernel: Kernel) -> list[str]:
    """Return what is wrong with a kernel that copies 16 bytes at a time, and then multiplies from shared memory."""
    loops = [loop for loop in kernel.inner_loops() if any("DMMA" in text for text in loop)]
    if not loops or not all(any(re.search(r"\bLDS\b", text) for text in loop) for loop in loops):
        return ["no loops with DMMA, or some without reads of shared memory"]
    if not any(re.search(READ, text) for _, text in kernel.code):
        return ["no reads of 16 bytes"]
    writes = [text for _, text in kernel.code if "STG" in text]
    if 2 * sum("STG.E.128" in text for text in writes) < len(writes):
        return ["few writes of 16 bytes"]
    spills = sum(re.search(SPILL, text) is not None for _, text in kernel.code)
    return [f"{spills} spills"] if spills else []


def main() -> int:
    """Print the faults of all objects; return 1 if there are any, or no hot loop was checked."""
    checked, planned, faults = 0, 0, []
    with ProcessPoolExecutor() as pool:
        for kernels, with_plan, found in pool.map(check, sys.argv[1:]):
            checked += kernels
            planned += with_plan
            faults += found
    print(*faults, f"checked {checked} kernels, and the hot loops of {planned}", sep="\n")
    return 1 if faults or not planned else 0


def check(object_path: str) -> tuple[int, int, list[str]]:
    """Return how many kernels an object holds, how many of them with a plan, and their faults."""
    path = Path(object_path)
    kernels = kernels_of(path, shutil.which("cuobjdump") or find_in_triton())
    planned = sum(KERNEL.search(kernel.name) is not None for kernel in kernels)
    faults = [f"{path.name} {kernel.name}: {fault}" for kernel in kernels for fault in faults_of(kernel)]
    return len(kernels), planned, faults


def find_in_triton() -> str:
    """Return the cuobjdump that triton brings along."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


if __name__ == "__main__":
    sys.exit(main())
