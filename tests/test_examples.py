# SPDX-License-Identifier: MIT
"""The demo and the benchmarks run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradsurgery
from conftest import needs_extension, on_cpu

ROOT = Path(__file__).parent.parent

pytestmark = on_cpu


@pytest.mark.filterwarnings("default")
def test_demo(tmp_path, capsys):
    multi_mnist = pytest.importorskip("examples.multi_mnist")
    picture = tmp_path / "curves.png"
    names = ["PCGrad", "GradNorm", "uw", "graddrop"]
    options = ["--quick", "--seeds", "2", "--epochs", "1", "--methods", *names]
    runs = multi_mnist.main([*options, "--output", str(picture)])
    assert {run.method for run in runs} == {"Plain sum", *names}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(0 <= value <= 1 for run in runs for value in run.accuracy)
    assert "plain sum" in capsys.readouterr().out


@pytest.fixture
def one_thread():
    """Use one thread: with several test processes, threads that share tiny convolutions would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("default")
def test_every_method_trains_the_demo(one_thread):
    multi_mnist = pytest.importorskip("examples.multi_mnist")
    names = gradsurgery.methods.available()
    train_set, test_set = multi_mnist.multi_mnist(8, 4)
    for name in names:
        run = multi_mnist.train_model(name, 0, 4, train_set, test_set, lambda: None)
        losses = torch.tensor(run.losses)
        assert losses.isfinite().all(), name
        assert losses[-1].sum() < losses[0].sum(), name


@needs_extension
def test_methods(tmp_path):
    for package in ("cvxpy", "rich", "torchjd"):
        pytest.importorskip(package)
    output = tmp_path / "methods.json"
    subprocess.run(
        [sys.executable, "-m", "bench.methods", "--quick", "--output", output],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    run = json.loads(output.read_text())
    assert {row["contender"] for row in run["rows"]} == {"gradsurgery", "gradsurgery pcgrad", "torchjd"}
    # The two targets against TorchJD for T = 8, which bench/results/cpu-methods.json exceeds by a factor above 3.
    met = {target["target"]: target["met"] for target in run["targets"]}
    for method in ("cagrad", "nash_mtl"):
        assert met[f"{method} weights T=8: at least 100 x faster than torchjd"]


@needs_extension
def test_peers(tmp_path):
    for package in ("pytorch_optimizer", "rich", "torchjd"):
        pytest.importorskip(package)
    output = tmp_path / "peers.json"
    subprocess.run(
        [sys.executable, "-m", "bench.peers", "--quick", "--output", output], cwd=ROOT, check=True, capture_output=True
    )
    run = json.loads(output.read_text())
    contenders = {row["contender"] for row in run["rows"]}
    assert {"gradsurgery", "torchjd", "pytorch_optimizer", "plain loop", "J.sum()"} <= contenders
    errors = [row["error"] for row in run["rows"] if row["contender"] == "gradsurgery" and row["error"] is not None]
    assert errors
    # bfloat16 directions are rounded to 8 bits.
    assert max(errors) < 1e-2
