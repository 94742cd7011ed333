# SPDX-License-Identifier: MIT
"""Print the rows of a run."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .timing import OURS, Row


def print_rows(console: Console, rows: list[Row], machine: dict[str, Any]) -> None:
    """Print one table, the contenders of a case below each other."""
    headings = ["stage", "T", "N", "dtype", "contender", "median", "p20 .. p80", "x ours", "error", "rounds"]
    table = Table(*headings, box=box.SIMPLE, title="Time of one call in milliseconds")
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[5:]:
        column.justify = "right"
    for _, group in groupby(rows, lambda row: (row.stage, row.tasks, row.size, row.dtype)):
        case = list(group)
        ours = next((row.median_ms for row in case if row.contender == OURS), None)
        for row in case:
            size = "-" if row.size is None else f"{row.size:g}"
            table.add_row(row.stage, str(row.tasks), size, row.dtype, row.contender, *_cells(row, ours))
        table.add_section()
    console.print(table)
    console.print("Error: relative, against float64; - where random orders leave nothing to compare with.")
    if machine["cache_bytes"] is not None:
        console.print(f"The last level of the cache holds {machine['cache_bytes'] / 1e6:.0f} MB.")
    for row in rows:
        if row.note:
            where = f"{row.stage} T={row.tasks}{'' if row.size is None else f' N={row.size:g}'} {row.dtype}"
            console.print(f"{where}, {row.contender}: {row.note}")


def _cells(row: Row, ours: float | None) -> list[str]:
    if row.median_ms is None:
        return ["skipped", "", "", "", ""]
    ratio = _short(row.median_ms / ours) if ours else ""
    error = "-" if row.error is None else f"{row.error:.0e}"
    spread = f"{_short(row.p20_ms)} .. {_short(row.p80_ms)}"
    return [_short(row.median_ms), spread, ratio, error, str(row.rounds)]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
