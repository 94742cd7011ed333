# SPDX-License-Identifier: MIT
"""Which commit a run measured."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


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
