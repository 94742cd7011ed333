# SPDX-License-Identifier: MIT
"""Print the rows of a GPU run as plain text, and store them with what is needed to repeat it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradsurgery as gs

from .gpu_timing import Row
from .origin import write

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RESULTS = Path(__file__).parent / "results"
HEADING = ["stage", "form", "T", "N", "dtype", "cache", "contender"]
FIGURES = ["median us", "p20", "p80", "x floor", "x flat", "host us", "error", "rounds"]
WIDTHS = [16, 10, 4, 11, 9, 5, 27]


def parse_options(module: str, description: str) -> argparse.Namespace:
    """Return the command line's options and, as ``command``, what repeats it."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--quick", action="store_true", help="few sizes and few rounds")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try this script out")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which the other cases are left out")
    parser.add_argument("--output", type=Path, help=f"the folder of the JSON ({RESULTS.name} for a whole run on a GPU)")
    options = parser.parse_args()
    if options.output is None and options.device == "cuda" and not options.quick:
        options.output = RESULTS
    if not gs.backends()[options.device].startswith("available"):
        parser.error(f"the {options.device} backend cannot be measured: {gs.backends()[options.device]}")
    options.command = f"python -m {module} --device {options.device}{' --quick' * options.quick}"
    return options


def print_ceilings(ceilings: dict[str, float]) -> None:
    """Print the measured ceilings, one a line."""
    for name, value in ceilings.items():
        print(f"{name.rsplit(' ', 1)[0]:32}{value:>12.4g} {name.rsplit(' ', 1)[1]}")


def print_heading() -> None:
    """Print the columns' names."""
    print(_line(HEADING, FIGURES))


def print_row(row: Row) -> None:
    """Print one row as soon as it is there, so that a run that is cut off has printed what it measured."""
    size = "-" if row.size is None else str(row.size)
    form = row.form if row.batch == 1 else f"x{row.batch}"
    where = [row.stage, form, str(row.tasks), size, row.dtype, row.cache, row.contender]
    figures = (row.median_us, row.p20_us, row.p80_us, row.x_floor, row.x_flat, row.host_us, row.error)
    cells = ["-" if figure is None else f"{figure:.4g}" for figure in figures]
    print(_line(where, [row.note] if row.note else [*cells, str(row.rounds)]), flush=True)


def store(
    folder: Path | None,
    benchmark: str,
    command: str,
    origin: dict[str, Any],
    rows: Sequence[DataclassInstance],
    verdicts: list[dict[str, Any]],
    **measured: object,
) -> None:
    """Write a run as JSON, named after the benchmark and the machine; without a folder, nothing."""
    if folder is None:
        return
    machine = origin["machine"]
    slug = re.sub(r"[^a-z0-9]+", "-", str(machine["name"]).lower()).strip("-") if "capability" in machine else "cpu"
    path = folder / f"{benchmark}-{slug}.json"
    write(path, command, origin, rows, verdicts, **measured)


def _line(where: list[str], figures: list[str]) -> str:
    left = " ".join(f"{cell:{width}}" for cell, width in zip(where, WIDTHS, strict=True))
    return f"{left} {' '.join(f'{cell:>9}' for cell in figures)}"
