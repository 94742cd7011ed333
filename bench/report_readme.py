# SPDX-License-Identifier: MIT
"""The sections of README.md that report.py writes from stored results."""

from __future__ import annotations

import itertools
import json
import textwrap
from pathlib import Path
from typing import Any

from . import plots
from .gpu_targets import judge
from .gpu_timing import Row
from .origin import PACKAGES
from .report_notes import commit_of
from .timing import ALLOCATING, MIN_ROUNDS, REFERENCE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
CPU, CPU_STEPS, CPU_METHODS, CPU_PROCESSES, GPU, GPU_PEERS, STEPS = (
    RESULTS / f"{name}.json"
    for name in (
        "cpu-peers",
        "step-cpu",
        "cpu-methods",
        "cpu-processes",
        "gpu-stages-nvidia-h200",
        "gpu-peers-nvidia-h200",
        "step-nvidia-h200",
    )
)
OTHER_CPU = RESULTS / "cpu-peers-intel-xeon.json"
SHOWN = [(2, 10**5), (2, 10**6), (8, 10**6), (2, 10**7), (8, 10**7), (32, 10**7)]
GPU_SHOWN = [("pcgrad", tasks, size) for size in (10**5, 10**7) for tasks in (2, 8, 32)]
GPU_SHOWN += [(method, 8, 10**5) for method in ("mgda", "upgrad", "cagrad")]


def _wrapped(lines: list[str]) -> str:
    """Return Markdown with each paragraph in lines of at most 120 characters; tables stay as they are."""
    prose = textwrap.TextWrapper(120, break_long_words=False, break_on_hyphens=False)
    parts = itertools.groupby(lines, lambda line: "" if not line else "|" if line.startswith("|") else "prose")
    texts = (prose.fill(" ".join(part)) if kind == "prose" else "\n".join(part) for kind, part in parts)
    return "\n".join(texts) + "\n"


def _versions(run: dict[str, Any], *names: str) -> str:
    """Return the versions of those of the packages that were installed."""
    return ", ".join(f"{name} {run['versions'][name]}" for name in names if name in run["versions"])


def _link(path: Path) -> str:
    return f"[{path.relative_to(ROOT)}]({path.relative_to(ROOT)})"


def cpu_section(run: dict[str, Any]) -> str:
    """Return the Markdown for one stored run."""
    rows = {
        (row["stage"], row["contender"], row["tasks"], row["size"]): row
        for row in run["rows"]
        if row["dtype"] == "float32" and row["median_ms"] is not None
    }

    def times(stage: str, contender: str, tasks: int, size: int) -> str:
        other = rows.get((stage, contender, tasks, size))
        if other is None:
            return "-"
        ratio = other["median_ms"] / rows[stage, "gradsurgery", tasks, size]["median_ms"]
        return f"{ratio:.1f}x" if other["rounds"] >= MIN_ROUNDS else f"about {ratio:.0f}x"

    lines = [
        "One call from float32 task gradients [T, N] to the direction. The columns PCGrad and MGDA have the time of",
        "gradsurgery, which writes to a given `out`, as in an optimizer's step. The columns after each have multiples",
        "of that time: of gradsurgery without `out=`, and of other implementations, which all make new tensors.",
        "",
        "| T | N | PCGrad | no `out=` | torchjd | pytorch_optimizer | plain loop | MGDA | no `out=` | torchjd |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for tasks, size in SHOWN:
        pcgrad, mgda = (
            f"{rows[stage, 'gradsurgery', tasks, size]['median_ms']:.2f} ms" for stage in ("pcgrad", "mgda")
        )
        contenders = (ALLOCATING, "torchjd", "pytorch_optimizer", "plain loop")
        others = [times("pcgrad", name, tasks, size) for name in contenders]
        of_mgda = [times("mgda", name, tasks, size) for name in contenders[:2]]
        cells = [tasks, f"{size:.0e}".replace("e+0", "e"), pcgrad, *others, mgda, *of_mgda]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    plain, torchjd = (
        [rows["pcgrad", name, tasks, size]["median_ms"] for tasks, size in SHOWN] for name in (REFERENCE, "torchjd")
    )
    slower = [mine / theirs for mine, theirs in zip(plain, torchjd, strict=True)]
    machine = run["machine"]
    lines += [
        "",
        "For MGDA the work differs: gradsurgery's weights are exact, torchjd's are those of at most 100 Frank-Wolfe",
        f'steps. "About": there was time for fewer than {MIN_ROUNDS} calls. Surgery is only one part of a training',
        "step: the T backward passes before it remain. Without a compiler, the `reference` backend takes "
        f"{min(slower):.1f} to {max(slower):.1f} times as long as torchjd for PCGrad in these cases.",
        "",
        f"Medians of one run of `{run['command']}` on {machine['cpu']}, {machine['threads']} threads; "
        f"{_versions(run, 'torch', *PACKAGES)}; load {machine['load_at_start']:.1f} at the start; {commit_of(run)}. "
        "All rows, with spreads, bfloat16 and errors:",
        "[bench/results/cpu-peers.json](bench/results/cpu-peers.json). How the measurements are taken:",
        "[bench/NOTES.md](bench/NOTES.md).",
        "",
        *_on_another(json.loads(OTHER_CPU.read_text())),
    ]
    return _wrapped(lines)


def _on_another(run: dict[str, Any]) -> list[str]:
    """Return what a run on another processor says of the largest case."""
    case = [row for row in run["rows"] if (row["stage"], row["tasks"], row["size"]) == ("pcgrad", 8, 10**7)]
    medians = {row["contender"]: row["median_ms"] for row in case if row["dtype"] == "float32"}
    torchjd, common = (medians[name] / medians["gradsurgery"] for name in ("torchjd", "pytorch_optimizer"))
    return [
        f"Factors depend on the machine: on {run['machine']['cpu']} torchjd takes {torchjd:.1f}x and pytorch_optimizer",
        f"{common:.0f}x the time of PCGrad at T = 8, N = 1e7",
        f"([{OTHER_CPU.name}]({OTHER_CPU.relative_to(ROOT)}), commit {run['commit'][:12]}).",
    ]


def cpu_steps_section(run: dict[str, Any]) -> str:
    """Return the Markdown for whole training steps on a CPU."""
    rows = {(row["workload"], row["contender"]): row for row in run["rows"] if row["median_ms"] is not None}

    def cell(workload: str, contender: str) -> str:
        row = rows.get((workload, contender))
        return "-" if row is None else f"{row['median_ms']:.0f} ms, {row['peak_mb']:.0f} MB"

    ours = [row["parts_ms"] for row in rows.values() if row["contender"] == "pcgrad, sequential"]
    least, most = (round(100 * find(p["backward"] / sum(p.values()) for p in ours)) for find in (min, max))
    contenders = {name: label for name, label in plots.BARS.items() if name != "torchjd UPGrad"}
    lines = [
        "Whole training steps of small models with PCGrad, forward and backward passes included, and the most memory",
        "that a step takes on top of what was allocated before it. In the column gradsurgery, backward passes take "
        f"{least} to {most} % of a step:",
        "",
        f"| model | T | N | {' | '.join(contenders.values())} |",
        f"|---|--:|--:|{'--:|' * len(contenders)}",
    ]
    for workload in dict.fromkeys(row["workload"] for row in run["rows"]):
        first = rows[workload, "sum of losses"]
        cells = [workload, first["tasks"], f"{first['shared']:,}", *(cell(workload, name) for name in contenders)]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    machine = run["machine"]
    lines += [
        "",
        '"Representation" is surgery on the gradients of the features that tasks share: an approximation, with one',
        "backward pass below the features ([docs/training.md](docs/training.md#fewer-or-cheaper-backward-passes)).",
        "torchjd batches its backward passes by default, and makes them one by one with `parallel_chunk_size=1`.",
        f"Medians of `{run['command']}` on {machine['cpu']}, {machine['threads']} threads; "
        f"{_versions(run, 'torch', *PACKAGES)}; load {machine['load_at_start']:.1f} at the start; {commit_of(run)}:",
        f"{_link(CPU_STEPS)}. The models:",
        "[bench/NOTES.md](bench/NOTES.md#whole-training-steps).",
    ]
    return _wrapped(lines)


def gpu_section(run: dict[str, Any]) -> str:
    """Return the Markdown for the stages on a GPU."""
    rows = {
        (row["tasks"], row["dtype"], row["contender"]): row
        for row in run["rows"]
        if (row["stage"], row["form"]) == ("chain", "flat")
        and row["floor_us"]
        and abs(row["tasks"] * row["size"] * plots.BYTES[row["dtype"]] - 300e6) < 1e6
    }

    def cell(*key: object) -> str:
        row = rows.get(key)
        return f"{row['median_us']:.0f} ({100 / row['x_floor']:.0f} %)" if row and row["median_us"] else "-"

    lines = [
        f"Microseconds from 300 MB of task gradients [T, N] to PCGrad's direction on one {run['machine']['name']}. In",
        "brackets: the share of this time that it would take to move the bytes alone, at the bandwidth measured in the",
        "same run. `torch.mm + mv` computes products and a weighted sum in the gradients' dtype, but no weights.",
        "",
        f"| T | dtype | {' | '.join(f'`{label}`' for label in plots.LINES.values())} |",
        "|--:|---|--:|--:|--:|",
    ]
    lines += [
        f"| {tasks} | {dtype} | {' | '.join(cell(tasks, dtype, contender) for contender in plots.LINES)} |"
        for dtype in plots.BYTES
        for tasks in (2, 8, 32)
    ]
    verdicts = [verdict["met"] for verdict in judge([Row(**row) for row in run["rows"]])]
    lines += [
        "",
        f"Medians of `{run['command']}`; torch {run['versions']['torch']}, CUDA {run['versions']['cuda']}; "
        f"{commit_of(run)}.",
        f"Of today's targets, `bench/gpu_targets.py`, this run met {verdicts.count(True)} and missed "
        f"{verdicts.count(False)} (its file has the targets of its day):",
        f"{_link(GPU)}. What changed since then, and what each change brought:",
        "[bench/HISTORY.md](bench/HISTORY.md#the-solvers-and-what-the-last-changes-brought).",
        "",
        "![Share of the bandwidth over the size of the gradients](docs/bandwidth.svg)",
    ]
    return _wrapped(lines)


def gpu_peers_section(run: dict[str, Any]) -> str:
    """Return the Markdown for whole calls on a GPU, beside other packages."""
    medians = {
        (row["stage"], row["tasks"], row["size"], row["contender"], row["how"]): row["median_us"]
        for row in run["rows"]
        if row["dtype"] == "float32" and row["median_us"] is not None
    }
    others = ("stack + mm + mv", "torchjd", "pytorch_optimizer")
    products = [r for r in run["rows"] if (r["contender"], r["how"]) == (others[0], "graph") and r["x_ours"]]
    least, most = (find(products, key=lambda row: row["x_ours"]) for find in (min, max))
    lines = [
        f"Whole calls on one {run['machine']['name']}, float32. The columns call and graph have gradsurgery's time in",
        "microseconds, for one of many calls in a row and for one in a CUDA graph. Other columns: multiples of the",
        "column call. `stack + mm + mv` first copies the rows into a matrix, which the others are given as such, and",
        "computes no weights; in CUDA graphs it",
        f"takes {least['x_ours']:.1f} (T = {least['tasks']}, N = {least['size']:,}, {least['dtype']}) to",
        f"{most['x_ours']:.0f} times as long as PCGrad.",
        "",
        f"| | T | N | call | graph | {' | '.join(others)} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in GPU_SHOWN:
        call, graph = (medians.get((*case, "gradsurgery", how)) for how in ("eager", "graph"))
        if call is None or graph is None:
            continue  # left out, or failed
        times = [medians.get((*case, other, "eager")) for other in others]
        cells = [*case[:2], f"{case[2]:.0e}".replace("e+0", "e"), f"{call:.0f}", f"{graph:.0f}"]
        cells += ["-" if time is None else f"{time / call:,.1f}x" for time in times]
        lines.append(f"| `{cells[0]}` | {' | '.join(str(cell) for cell in cells[1:])} |")
    left_out = sum(row["note"].startswith("left out") for row in run["rows"])
    cases = left_out + len({(r["stage"], r["tasks"], r["size"], r["dtype"]) for r in run["rows"] if r["median_us"]})
    lines += [
        "",
        f"Medians of `{run['command']}`, which had time for {cases - left_out} of {cases} cases; "
        f"{_versions(run, *PACKAGES)}; {commit_of(run)}:",
        f"{_link(GPU_PEERS)}.",
    ]
    return _wrapped(lines)


def steps_section(run: dict[str, Any]) -> str:
    """Return the Markdown for whole training steps."""
    lines = [
        f"What takes the time in whole training steps on one {run['machine']['name']}",
        f"({_link(STEPS)}, {commit_of(run)}):",
        "",
        "![Time of training steps, split into forward, backward, surgery and optimizer](docs/steps.svg)",
    ]
    return _wrapped(lines)
