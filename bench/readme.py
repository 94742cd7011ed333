# SPDX-License-Identifier: MIT
"""Write the README's speed section from the stored results: ``python -m bench.readme``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu-peers.json"
BEGIN, END = "<!-- benchmark: begin -->\n", "<!-- benchmark: end -->"
SHOWN = [(2, 10**5), (2, 10**6), (8, 10**6), (2, 10**7), (8, 10**7), (32, 10**7)]


def section(run: dict[str, Any]) -> str:
    """Return the Markdown for one stored run."""
    medians = {
        (row["stage"], row["contender"], row["tasks"], row["size"]): row["median_ms"]
        for row in run["rows"]
        if row["dtype"] == "float32" and row["median_ms"] is not None
    }

    def times(stage: str, contender: str, tasks: int, size: int) -> str:
        other = medians.get((stage, contender, tasks, size))
        return "-" if other is None else f"{other / medians[stage, 'gradsurgery', tasks, size]:.1f}x"

    lines = [
        "From float32 task gradients [T, N] to the direction: the time of one call here, and the others' as multiples",
        "of it.",
        "",
        "| T | N | PCGrad | torchjd | pytorch_optimizer | plain loop | MGDA | torchjd |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for tasks, size in SHOWN:
        pcgrad, mgda = (f"{medians[stage, 'gradsurgery', tasks, size]:.2f} ms" for stage in ("pcgrad", "mgda"))
        others = [times("pcgrad", name, tasks, size) for name in ("torchjd", "pytorch_optimizer", "plain loop")]
        cells = [tasks, f"{size:.0e}".replace("e+0", "e"), pcgrad, *others, mgda, times("mgda", "torchjd", tasks, size)]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    machine, versions = run["machine"], run["versions"]
    lines += [
        "",
        "MGDA is not the same work everywhere: the weights here are exact, torchjd's are those of at most 100",
        "Frank-Wolfe steps. Surgery is one part of a step: the T backward passes before it remain.",
        "",
        f"Medians of one run of `{run['command']}` on {machine['cpu']}, {machine['threads']} threads; torch "
        f"{versions['torch']}, torchjd {versions['torchjd']}, pytorch_optimizer {versions['pytorch_optimizer']}; "
        f"commit {run['commit'][:12]}, {run['date'][:10]}. All rows, with spreads, bfloat16 and errors:",
        "[bench/results/cpu-peers.json](bench/results/cpu-peers.json). How they are taken:",
        "[bench/NOTES.md](bench/NOTES.md).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace the README's section."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(before + BEGIN + section(json.loads(RESULTS.read_text())) + END + after)


if __name__ == "__main__":
    main()
