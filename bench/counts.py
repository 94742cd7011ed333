# SPDX-License-Identifier: MIT
"""Count what a call uses besides time: memory, kernels, waits of the host for the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of a device's memory that tensors take during a call, above those before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        call()
    events = [event for event in _events(found) if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Return how many kernels, copies and fills a call has the GPU do; None without a GPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type() == DeviceType.CUDA for event in _events(found))


def synchronisations(call: Callable[[], object], device: torch.device) -> int | None:
    """Return how often a call waits for the GPU, as far as torch knows; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in found)


def _events(found: profile) -> list[Any]:
    """Return what was recorded, without the tree that profile.events() makes of it: a call may have 100,000."""
    return found.profiler.kineto_results.events()
