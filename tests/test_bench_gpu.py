# SPDX-License-Identifier: MIT
"""The GPU benchmark's scripts, as far as a machine without a GPU can run them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gradsurgery
from bench import gpu_cases, gpu_ceilings, gpu_stages, gpu_targets, gpu_timing
from bench.gpu_timing import FLAT, OURS, Row

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu.sh"
H200_GRAM = Row("gram", "flat", 8, 10**7, "float32", "cold")


def run_script(*arguments):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


needs_cpu_backend = pytest.mark.skipif(
    not gradsurgery.backends()["cpu"].startswith("available"), reason=gradsurgery.backends()["cpu"]
)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """Return what a quick run on the CPU prints and stores."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "bench.gpu_stages", "--quick", "--device", "cpu", "--output", str(folder)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (stored,) = folder.glob("gpu-stages-*.json")
    return run.stdout, json.loads(stored.read_text())


@needs_cpu_backend
def test_a_run_stores_what_is_needed_to_repeat_it(quick_run):
    _, stored = quick_run
    assert stored["command"] == "python -m bench.gpu_stages --device cpu --quick"
    assert set(stored) == {"machine", "versions", "commit", "date", "command", "ceilings", "rows", "targets"}
    assert stored["ceilings"]["read GB/s"] > 0
    assert stored["versions"]["torch"] == torch.__version__


@needs_cpu_backend
def test_a_run_measures_every_stage_and_form(quick_run):
    _, stored = quick_run
    rows = stored["rows"]
    assert not [row["note"] for row in rows if row["note"]]
    assert all(0 < row["p20_us"] <= row["median_us"] <= row["p80_us"] for row in rows)
    ours = {(row["stage"], row["form"], row["cache"]): row for row in rows if row["contender"] == OURS}
    for stage in gpu_cases.STAGES:
        assert ours[stage, "flat", "cold"]["x_floor"] > 0
        assert ours[stage, "flat", "hot"]["host_us"] > 0
        assert ours[stage, "list", "cold"]["x_flat"] > 0
    assert {"torch.mm", "torch.mv", "torch.mm + mv", "torch.cat + mm + mv", FLAT} < {row["contender"] for row in rows}


@needs_cpu_backend
def test_results_agree_with_float64(quick_run):
    _, stored = quick_run
    bounds = {"float64": 1e-9, "float32": 1e-6, "bfloat16": 4e-3}
    for row in stored["rows"]:
        if row["contender"] == OURS:
            assert row["error"] <= (1e-6 if row["stage"] == "gram" else bounds[row["dtype"]]), row
        elif row["contender"] != FLAT:
            assert 0 < row["error"] < 1e-2, row


@needs_cpu_backend
def test_targets_are_judged_and_printed(quick_run):
    printed, stored = quick_run
    assert len(stored["targets"]) == len(gpu_targets.TARGETS)
    for verdict in stored["targets"]:
        assert verdict["target"] in printed
        assert (verdict["met"] is None) == (verdict["measured"] is None)
    assert any(verdict["met"] is not None for verdict in stored["targets"])
    assert "300 MB" in next(verdict["target"] for verdict in stored["targets"] if verdict["met"] is None)


@needs_cpu_backend
def test_a_run_that_is_cut_off_stores_what_it_has(monkeypatch, tmp_path):
    cases = iter([1])

    def measure(*arguments):
        if next(cases, None) is None:
            raise KeyboardInterrupt
        return gpu_timing.measure(*arguments)

    monkeypatch.setattr(gpu_stages, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["gpu_stages", "--quick", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        gpu_stages.main()
    (stored,) = tmp_path.iterdir()
    assert {row["median_us"] > 0 for row in json.loads(stored.read_text())["rows"]} == {True}


class CompilationError(Exception):
    """Like Triton's exception of this name, not a RuntimeError."""


def test_another_contenders_failure_is_noted():
    def fail():
        raise CompilationError("no such instruction\nat 1:1")

    calls = {OURS: [lambda: None], gpu_timing.TRITON: [fail]}
    case = gpu_timing.Case(gpu_timing.Spec("gram", "flat", 2, 100, "float32", "hot"), calls, {})
    ceilings = {"read GB/s": 1.0, "copy GB/s": 1.0}
    ours, triton = gpu_timing.measure(case, torch.device("cpu"), 0.001, ceilings)
    assert ours.median_us > 0
    assert (triton.median_us, triton.note) == (None, "failed: no such instruction")
    with pytest.raises(CompilationError):
        gpu_timing.measure(replace(case, calls={OURS: [fail]}), torch.device("cpu"), 0.001, ceilings)


@needs_cpu_backend
def test_a_trial_stores_nothing(monkeypatch):
    monkeypatch.setattr(gpu_stages, "_specs", lambda plan: [])
    monkeypatch.setattr(sys, "argv", ["gpu_stages", "--quick", "--device", "cpu"])
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "bench/results").iterdir()}
    assert gpu_stages.main() == 0
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "bench/results").iterdir()} == before


@needs_cpu_backend
@pytest.mark.parametrize(
    ("budget", "status", "note"), [("0", 0, "left out: the time is up"), ("60", 1, "failed: no such kernel")]
)
def test_what_is_not_measured_is_stored_as_such(monkeypatch, tmp_path, budget, status, note):
    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_stages, "measure", fail)
    arguments = ["--quick", "--device", "cpu", "--budget", budget, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_stages", *arguments])
    assert gpu_stages.main() == status
    (stored,) = tmp_path.iterdir()
    run = json.loads(stored.read_text())
    assert {row["note"] for row in run["rows"]} == {note}
    assert all(verdict["met"] is None for verdict in run["targets"])


@pytest.mark.parametrize(("figures", "met"), [([1.0, 1.08], True), ([1.0, 1.09], False), ([float("nan"), 1.0], False)])
def test_the_worst_row_decides(figures, met):
    rows = [Row(**{**vars(H200_GRAM), "x_floor": figure}) for figure in figures]
    verdict = gpu_targets.judge(rows)[0]
    assert verdict["target"].startswith("gram flat float32 T<=32")
    assert verdict["met"] is met


@pytest.mark.parametrize(
    "other", [{"cache": "hot"}, {"form": "list"}, {"tasks": 48}, {"size": 10**6}, {"contender": "torch.mm"}]
)
def test_a_target_is_about_its_own_rows(other):
    row = Row(**{**vars(H200_GRAM), "x_floor": 1.0, **other})
    assert not gpu_targets.TARGETS[0].covers(row)


def test_forms_hold_the_same_bytes():
    bench = gpu_cases.Bench.create(torch.device("cpu"), 10**6, 10**6)
    spec = gpu_cases.Spec("gram", "list", 3, gpu_cases.columns(1e6, 3, "float32"), "float32", "cold")
    assert bench.sets(spec) * spec.bytes >= 2 * bench.cache_bytes
    for rows in bench.lists(spec):
        assert [sum(g.numel() for g in row) for row in rows] == [spec.size] * 3
        offsets = {(g.data_ptr() - rows[0][0].data_ptr()) % gpu_cases.TENSOR_ALIGNMENT for row in rows for g in row}
        assert offsets == {0}
    for matrix in bench.matrices(spec, misaligned=True):
        starts = {row.data_ptr() // 4 % 4 for row in matrix}
        assert starts <= {1, 3}
        assert len(starts) == 2


def test_script_parses_and_explains_itself():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert "--sanitize" in run_script("--help").stdout
    for arguments in (["--tests"], ["--limit"], ["--limit", "0"], ["--limit", "soon"]):
        wrong = run_script(*arguments)
        assert wrong.returncode == 2
        assert "usage" in wrong.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so():
    run = run_script("--build")
    assert run.returncode == 1
    assert "bench/gpu.sh: no GPU: torch.cuda.is_available() is False" in run.stderr
    assert run.stdout == ""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_ceilings_compile(tmp_path):
    assert gpu_ceilings.compile_library(tmp_path, (9, 0)).stat().st_size > 0
