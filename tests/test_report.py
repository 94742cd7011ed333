# SPDX-License-Identifier: MIT
"""Figures and plots of README and NOTES.md follow from the stored results."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from bench import plots, report, report_notes, report_readme

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_figures_and_plots_are_what_the_stored_results_say(tmp_path):
    assert report.differences(ROOT) == []
    for source, _ in [section for sections in report.SECTIONS.values() for section in sections.values()]:
        assert not json.loads(source.read_text())["commit"].endswith("-dirty")
    for folder in ("docs", "bench"):
        (tmp_path / folder).mkdir()
    for name in ("README.md", "docs/steps.svg", "bench/NOTES.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text(README.replace("| 2 | float32 | 2", "| 2 | float32 | 1"))
    assert report.differences(tmp_path) == ["README.md", "docs/bandwidth.svg"]
    steps = tmp_path / "docs/steps.svg"
    for text in (steps.read_text().replace("resnet", "resnet-18"), (ROOT / "docs/bandwidth.svg").read_text()):
        steps.write_text(text)
        assert report.differences(tmp_path) == ["README.md", *report.PLOTS]
    notes = tmp_path / "bench/NOTES.md"
    notes.write_text(notes.read_text().replace("| `upgrad` | ", "| `upgrad` | 1"))
    assert report.differences(tmp_path) == ["README.md", "bench/NOTES.md", *report.PLOTS]
    report.write(tmp_path)
    assert report.differences(tmp_path) == []
    assert (tmp_path / "README.md").read_text() == README


def test_runs_that_lack_cases_have_sections_and_plots():
    """As runs that were cut off, or in which contenders failed."""
    peers = json.loads(report.GPU_PEERS.read_text())
    peers["versions"].pop("torchjd")
    for row in peers["rows"]:
        if row["tasks"] == 8 or row["contender"] == "torchjd":
            row |= {"median_us": None, "x_ours": None, "note": "failed: out of memory"}
    section = report_readme.gpu_peers_section(peers)
    assert "| `pcgrad` | 2 |" in section
    assert "| `pcgrad` | 8 |" not in section
    assert "; pytorch_optimizer 4.1.0; commit" in " ".join(section.split())
    stages = json.loads(report.GPU.read_text())
    stages["rows"] = [row for row in stages["rows"] if row["tasks"] != 8 or "triton" not in row["contender"]]
    assert " | - | " in report_readme.gpu_section(stages)
    steps = json.loads(report.CPU_STEPS.read_text())
    steps["versions"].pop("torchjd")
    for row in steps["rows"]:
        if "torchjd" in row["contender"]:
            row |= {"median_ms": None, "parts_ms": {}}
    assert " - | - | " in report_readme.cpu_steps_section(steps)
    assert " | - | - |" in report_notes.steps_table(steps)
    steps = json.loads(report.STEPS.read_text())
    first = steps["rows"][0]["workload"]
    for row in steps["rows"]:
        if row["workload"] != first:
            row |= {"median_ms": None, "parts_ms": {}}
    assert len(plots.steps(steps).axes) == 1
