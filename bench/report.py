# SPDX-License-Identifier: MIT
"""Write figures and plots of README and NOTES.md from the stored results: ``python -m bench.report``.

With ``--check`` nothing is written, and what disagrees with the stored results is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from . import plots
from .report_notes import methods_table, processes_table, steps_table
from .report_readme import (
    CPU,
    CPU_METHODS,
    CPU_PROCESSES,
    CPU_STEPS,
    GPU,
    GPU_PEERS,
    ROOT,
    STEPS,
    cpu_section,
    cpu_steps_section,
    gpu_peers_section,
    gpu_section,
    steps_section,
)

MARK = "results: none yet"
"""What stands in a plot in place of its mark."""

Section = tuple[Path, Callable[[dict[str, Any]], str]]
SECTIONS: dict[str, dict[str, Section]] = {
    "README.md": {
        "benchmark": (CPU, cpu_section),
        "cpu-steps": (CPU_STEPS, cpu_steps_section),
        "gpu": (GPU, gpu_section),
        "gpu-peers": (GPU_PEERS, gpu_peers_section),
        "steps": (STEPS, steps_section),
    },
    "bench/NOTES.md": {
        "methods": (CPU_METHODS, methods_table),
        "step-table": (CPU_STEPS, steps_table),
        "processes": (CPU_PROCESSES, processes_table),
    },
}
PLOTS: dict[str, tuple[Path, Callable[[dict[str, Any]], Figure]]] = {
    "docs/bandwidth.svg": (GPU, plots.bandwidth),
    "docs/steps.svg": (STEPS, plots.steps),
}


def with_sections(text: str, sections: dict[str, Section]) -> str:
    """Return a page's text with the sections that the stored results yield."""
    for name, (source, section) in sections.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = before + begin + section(json.loads(source.read_text())) + end + rest.split(end)[1]
    return text


def digest(source: Path, text: str) -> str:
    """Return what a plot, as text with MARK in it, of these results and by the code as it is, is marked with."""
    return hashlib.sha256(source.read_bytes() + Path(plots.__file__).read_bytes() + text.encode()).hexdigest()


def differences(root: Path) -> list[str]:
    """Return what in this folder does not agree with the stored results."""
    pages = {page: (root / page).read_text() for page in SECTIONS}
    found = [page for page, text in pages.items() if with_sections(text, SECTIONS[page]) != text]
    for name, (source, _) in PLOTS.items():
        text = (root / name).read_text() if (root / name).exists() else ""
        mark = re.search(r"results: ([0-9a-f]+)", text)
        if mark is None or mark[1] != digest(source, text.replace(mark[0], MARK)):
            found.append(name)
    return found


def write(root: Path) -> None:
    """Write the pages' sections and the plots."""
    for page, sections in SECTIONS.items():
        (root / page).write_text(with_sections((root / page).read_text(), sections))
    for name, (source, plot) in PLOTS.items():
        file = io.StringIO()
        plot(json.loads(source.read_text())).savefig(file, format="svg", metadata={"Date": None, "Description": MARK})
        text = file.getvalue()
        (root / name).write_text(text.replace(MARK, f"results: {digest(source, text)}"))


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where something disagrees")
    if not parser.parse_args().check:
        write(ROOT)
    elif found := differences(ROOT):
        sys.exit(f"not what the stored results say: {', '.join(found)} (python -m bench.report writes them)")


if __name__ == "__main__":
    main()
