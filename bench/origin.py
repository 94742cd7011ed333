# SPDX-License-Identifier: MIT
"""Where a run was measured and with which versions, and how it is stored."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import gradsurgery as gs

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


PACKAGES = ("torchjd", "pytorch_optimizer")


def provenance(device: torch.device) -> dict[str, Any]:
    """Return the machine, the versions, the commit and the date."""
    machine: dict[str, object] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cache_bytes": _last_cache_bytes(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }
    machine |= {"name": machine["cpu"], "backend": gs.backends()[device.type]}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
            **_driver(device),
        }
    versions = {"gradsurgery": gs.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"machine": machine, "versions": versions, "commit": commit(), "date": date}


def write(
    path: Path,
    command: str,
    origin: dict[str, Any],
    rows: Sequence[DataclassInstance],
    verdicts: list[dict[str, Any]],
    **measured: object,
) -> None:
    """Write a run as JSON."""
    content = {**origin, "command": command, **measured, "rows": [asdict(row) for row in rows], "targets": verdicts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(rows)} rows in {path}")


def commit() -> str:
    """Return $GIT_COMMIT, else the checkout's commit, with -dirty if anything but stored results differs from it."""
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
    """Return the size of the last level of the first core's cache, if Linux tells it."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=None)


def _driver(device: torch.device) -> dict[str, str]:
    """Return what nvidia-smi knows of the GPU; nothing without it."""
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.memory"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields.split(","), (value.strip() for value in answer.split(",")), strict=False))
