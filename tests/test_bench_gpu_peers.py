# SPDX-License-Identifier: MIT
"""The GPU benchmark against other packages, as far as a machine without a GPU can run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradsurgery
from bench import counts, gpu_peer_contenders, gpu_peer_targets, gpu_peers, gpu_profile
from bench.exact import exact_gram
from bench.gpu_cases import Bench
from bench.gpu_timing import OURS, Spec

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
BOUNDS = {"float32": 1e-6, "bfloat16": 4e-3}
pytestmark = pytest.mark.skipif(
    not gradsurgery.backends()["cpu"].startswith("available"), reason=gradsurgery.backends()["cpu"]
)
pytest.importorskip("torchjd")
pytest.importorskip("pytorch_optimizer")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """Return what a quick run on the CPU prints and stores."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "bench.gpu_peers", "--quick", "--device", "cpu", "--output", str(folder)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads((folder / "gpu-peers-cpu.json").read_text())


def test_every_contender_is_measured_and_stored(quick_run):
    printed, stored = quick_run
    assert set(stored) == {"machine", "versions", "commit", "date", "command", "ceilings", "rows", "targets"}
    assert {"torchjd", "pytorch_optimizer"} <= set(stored["versions"])
    by_method = {}
    for row in stored["rows"]:
        if row["note"]:
            assert row["contender"] == "torchjd"  # its solvers do not take bfloat16
            continue
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["x_floor"] > 0
        by_method.setdefault(row["stage"], set()).add(row["contender"])
        assert f"{row['median_us']:.4g}" in printed
    assert by_method["pcgrad"] == {OURS, gpu_peer_contenders.PRODUCTS, "pytorch_optimizer", "torchjd"}
    assert all(by_method[method] == {OURS, "torchjd"} for method in ("mgda", "upgrad", "cagrad"))


def test_directions_agree_with_float64(quick_run):
    _, stored = quick_run
    errors = [row for row in stored["rows"] if row["error"] is not None]
    assert {row["contender"] for row in errors} == {
        OURS,
        gpu_peer_contenders.PRODUCTS,
        "pytorch_optimizer",
        "torchjd",
    }
    for row in errors:
        # TorchJD's MGDA takes at most 100 Frank-Wolfe steps; its CAGrad uses an interior-point solver.
        loose = row["contender"] == "torchjd" and row["stage"] in ("mgda", "cagrad")
        assert row["error"] <= (2e-2 if loose else BOUNDS[row["dtype"]]), row


def test_a_direction_is_compared_with_the_weights_of_a_first_call():
    bench = Bench.create(CPU, 0, 10**6)
    spec = Spec("pcgrad", "flat", 3, 1000, "float32", "cold")
    matrices = bench.matrices(spec)
    # All pairs conflict, so another visiting order gives another direction.
    matrices[0][1:] -= 0.5 * matrices[0][0]
    found = {c.name: c for c in gpu_peer_contenders.contenders(bench, spec, matrices, exact_gram(matrices[0]))}
    row = gpu_peers.PeerRow("pcgrad", "flat", 3, 1000, "float32", "cold")
    clock = gpu_peers.Clock(CPU, gpu_peers.QUICK, {"read GB/s": 1.0, "copy GB/s": 1.0})
    calls = found[OURS].calls(matrices)
    for _ in range(3):
        calls[0]()
    clock.describe(row, found[OURS], matrices[0], calls)
    assert row.error < 1e-6
    assert found["torchjd"].weights is found["pytorch_optimizer"].weights is None


def test_a_slow_contender_is_skipped(monkeypatch):
    monkeypatch.setattr(gpu_peers, "CAP_S", 0.0)
    bench = Bench.create(CPU, 0, 10**6)
    clock = gpu_peers.Clock(CPU, gpu_peers.QUICK, {"read GB/s": 1.0, "copy GB/s": 1.0})
    first, second = (clock.measure(bench, Spec("mgda", "flat", tasks, 1000, "float32", "cold")) for tasks in (2, 4))
    assert not [row.note for row in first if row.note]
    assert all(row.note.startswith("skipped: one call") and row.median_us is None for row in second)


def test_a_failure_of_ours_is_one_of_the_run(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_peer_contenders, "_ours", fail)
    monkeypatch.setattr(gpu_peers, "METHODS", ("mgda",))
    monkeypatch.setattr(sys, "argv", ["gpu_peers", "--quick", "--device", "cpu", "--output", str(tmp_path)])
    assert gpu_peers.main() == 1


def test_a_case_that_fails_leaves_the_others(monkeypatch, tmp_path):
    def exact(matrix):
        if len(matrix) == 2:
            raise RuntimeError("out of memory")
        return exact_gram(matrix)

    monkeypatch.setattr(gpu_peers, "exact_gram", exact)
    monkeypatch.setattr(gpu_peers, "METHODS", ("mgda",))
    monkeypatch.setattr(sys, "argv", ["gpu_peers", "--quick", "--device", "cpu", "--output", str(tmp_path)])
    assert gpu_peers.main() == 1
    (stored,) = tmp_path.iterdir()
    rows = json.loads(stored.read_text())["rows"]
    assert {(row["tasks"], row["note"]) for row in rows if row["contender"] == OURS} == {
        (2, "failed: out of memory"),
        (4, ""),
    }


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    bench = Bench.create(CPU, 0, 10**6)
    clock = gpu_peers.Clock(CPU, gpu_peers.QUICK, {"read GB/s": 1.0, "copy GB/s": 1.0})
    ours, theirs = clock.measure(bench, Spec("mgda", "flat", 2, 1000, "float32", "cold"))
    assert not ours.note
    assert (theirs.contender, theirs.note[:7]) == ("torchjd", "failed:")
    assert "torchjd" in theirs.note[7:]


def test_a_run_that_is_cut_off_stores_what_it_has(monkeypatch, tmp_path):
    def measure(self, bench, spec):
        if spec.tasks > 2:
            raise KeyboardInterrupt
        return [gpu_peers.PeerRow(**vars(spec), median_us=1.0)]

    monkeypatch.setattr(gpu_peers.Clock, "measure", measure)
    monkeypatch.setattr(gpu_peers, "print_case", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu_peers", "--quick", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        gpu_peers.main()
    (stored,) = tmp_path.iterdir()
    assert [row["tasks"] for row in json.loads(stored.read_text())["rows"]] == [2]


@pytest.mark.parametrize(("us", "met"), [(49.0, False), (50.0, True)])
def test_targets_are_judged_by_dtype_and_way_to_call(us, met):
    ours = gpu_peers.PeerRow("pcgrad", "flat", 2, 10**5, "bfloat16", "cold", median_us=10.0, how="graph")
    other = gpu_peers.PeerRow(
        "pcgrad",
        "flat",
        2,
        10**5,
        "bfloat16",
        "cold",
        contender=gpu_peer_contenders.PRODUCTS,
        median_us=us,
        how="graph",
    )
    eager = gpu_peers.PeerRow("pcgrad", "flat", 2, 10**5, "float32", "cold", median_us=1.0)
    verdicts = [v for v in gpu_peer_targets.judge([ours, other, eager]) if v["measured"] is not None]
    assert [(v["measured"], v["met"]) for v in verdicts] == [(us / 10, met)]
    assert verdicts[0]["target"].endswith("bfloat16, graph")


def test_counts_need_a_gpu_but_for_memory():
    assert counts.launches(lambda: None, CPU) is None
    assert counts.synchronisations(lambda: None, CPU) is None
    assert counts.peak_bytes(lambda: torch.empty(1000, dtype=torch.float64), CPU) >= 8000


def test_every_case_to_profile_runs_under_a_name_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["profile", "--device", "cpu", "--scale", "1e-3", "--output", str(tmp_path)])
    gpu_profile.main()
    (stored,) = tmp_path.iterdir()
    ranges = [gpu_profile.Range.of(spec) for spec in gpu_profile.specs(1)]
    assert len({each.name for each in ranges}) == len(ranges) == len(json.loads(stored.read_text())["rows"])
