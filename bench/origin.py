# SPDX-License-Identifier: MIT
"""What a run measured, and where."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import gradsurgery as gs


def origin(machine: dict[str, object], packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return the machine, the versions, also of those of the other packages that are there, the commit and the date."""
    return {
        "machine": machine,
        "versions": {
            "gradsurgery": gs.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **({} if torch.version.cuda is None else {"cuda": torch.version.cuda}),
            **_installed(packages),
        },
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def host() -> dict[str, object]:
    """Return the processor, its cores and cache, torch's threads and what else runs."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cache_bytes": _last_cache_bytes(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """Return $GIT_COMMIT, else the checkout's commit, with -dirty where anything but stored results differs from it."""
    if named := os.environ.get("GIT_COMMIT"):
        return named
    root = Path(__file__).parent.parent
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--", ".", ":!bench/results"])
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("-dirty" if changes else "")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _last_cache_bytes() -> int | None:
    """Return the size of the last level of the first core's cache, where Linux tells it."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=None)


def _installed(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
