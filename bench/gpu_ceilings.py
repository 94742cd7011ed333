# SPDX-License-Identifier: MIT
"""Measure the best that the machine can do: bandwidths, instruction rates, barriers, the gap between two kernels."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "ceilings.cu"
WARP = 32
GAP_KERNELS = 400
BARRIERS = 200
WINDOWS = (300_000_000, 28_000_000)
"""Bytes that one launch reads or copies, which shows the cost of starting and ending it at the targets' sizes."""

# In the order of ceiling_rate_us: name, operations of one instruction of a warp, words per lane, the
# words' dtype, compute capability from which it exists.
INSTRUCTIONS = [
    ("mma m8n8k4 f64", 2 * 8 * 8 * 4, 2, torch.float64, 8),
    ("mma m16n8k8 f64", 2 * 16 * 8 * 8, 6, torch.float64, 9),
    ("mma m16n8k16 bf16", 2 * 16 * 8 * 16, 12, torch.bfloat16, 8),
    ("mma m16n8k8 tf32", 2 * 16 * 8 * 8, 6, torch.float32, 8),
    ("fma f64", 2 * WARP, 2, torch.float64, 0),
    ("conversion f32 f64", 2 * WARP, 2, torch.float64, 0),
]


def measure(device: torch.device, size: int) -> dict[str, float]:
    """Return the ceilings by name, bandwidths measured over ``size`` bytes: in GB/s, TFLOP/s and microseconds."""
    return _host_bandwidths(size) if device.type == "cpu" else _gpu_ceilings(device, size)


def compile_library(folder: Path, capability: tuple[int, int]) -> Path:
    """Compile ceilings.cu for one compute capability."""
    nvcc = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    # From 9.0 on, only the "a" variants have the instructions that are specific to an architecture.
    arch = f"{capability[0]}{capability[1]}" + ("a" if capability[0] >= 9 else "")
    library = folder / "ceilings.so"
    command = [nvcc, "-std=c++17", "-O3", "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-shared"]
    subprocess.run([*command, "-Xcompiler", "-fPIC", str(SOURCE), "-o", str(library)], check=True)
    return library


def _gpu_ceilings(device: torch.device, size: int) -> dict[str, float]:
    capability = torch.cuda.get_device_capability(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(compile_library(Path(folder), capability)))
    pointer, size_type, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, arguments in {
        "ceiling_read_us": [pointer, size_type, size_type, number, number, number, pointer],
        "ceiling_copy_us": [pointer, size_type, size_type, number, number, number, pointer],
        "ceiling_rate_us": [number, pointer, number, number, number, pointer],
        "ceiling_barrier_us": [number, number, number],
        "ceiling_gap_us": [number, number, number, number],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_double
    return {
        **_bandwidths(library, device, processors, size),
        **_rates(library, device, processors, capability[0]),
        **_barriers(library, processors, capability[0]),
        **_gaps(library, processors),
    }


def _bandwidths(library: ctypes.CDLL, device: torch.device, processors: int, size: int) -> dict[str, float]:
    data = torch.randn(size // 4, device=device)
    target = torch.empty_like(data)
    torch.cuda.synchronize(device)
    shapes = list(product((4, 8), (1, 2, 4, 8, 16, 32), (256, 512, 1024)))
    found = {}
    for window in (size, *(window for window in WINDOWS if window < size)):
        moved = size // window * window
        for name, function, ways in (("read", library.ceiling_read_us, 1), ("copy", library.ceiling_copy_us, 2)):
            us = min(
                _checked(
                    function(data.data_ptr(), size, window, unroll, blocks * processors, threads, target.data_ptr())
                )
                for unroll, blocks, threads in shapes
            )
            label = name if window == size else f"{name} of {window / 1e6:g} MB"
            found[f"{label} GB/s"] = ways * moved / us / 1e3
    return found


def _rates(library: ctypes.CDLL, device: torch.device, processors: int, major: int) -> dict[str, float]:
    iterations = 4096
    issued = iterations * library.ceiling_chains()
    rates = {}
    for index, (name, operations, words, dtype, since) in enumerate(INSTRUCTIONS):
        if major < since:
            continue
        operands = torch.randn(WARP * words, dtype=dtype, device=device)
        best = 0.0
        for blocks, threads in product((1, 2, 4), (128, 256, 512)):
            sink = torch.empty(blocks * processors * threads, dtype=torch.float64, device=device)
            torch.cuda.synchronize(device)
            grid = blocks * processors
            us = library.ceiling_rate_us(index, operands.data_ptr(), iterations, grid, threads, sink.data_ptr())
            best = max(best, grid * threads // WARP * issued * operations / _checked(us) / 1e6)
        rates[f"{name} TFLOP/s"] = best
    return rates


def _barriers(library: ctypes.CDLL, processors: int, major: int) -> dict[str, float]:
    kinds = ("grid", "cluster") if major >= 9 else ("grid",)
    return {
        f"barrier {kind} us": _checked(library.ceiling_barrier_us(BARRIERS, processors, clusters))
        for clusters, kind in enumerate(kinds)
    }


def _gaps(library: ctypes.CDLL, processors: int) -> dict[str, float]:
    return {
        f"gap {how}{' overlapped' if overlap else ''} us": _checked(
            library.ceiling_gap_us(GAP_KERNELS, processors, overlap, as_graph)
        )
        for as_graph, how in enumerate(("stream", "graph"))
        for overlap in (0, 1)
    }


def _host_bandwidths(size: int) -> dict[str, float]:
    data = torch.randn(size // 4, device="cpu")
    target = torch.empty_like(data)
    read = min(_seconds(data.sum) for _ in range(5))
    copy = min(_seconds(lambda: target.copy_(data)) for _ in range(5))
    return {"read GB/s": data.nbytes / read / 1e9, "copy GB/s": 2 * data.nbytes / copy / 1e9}


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _checked(us: float) -> float:
    if us < 0:
        raise RuntimeError("a kernel of ceilings.cu failed")
    return us
