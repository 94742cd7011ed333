# SPDX-License-Identifier: MIT
"""The demo and the benchmarks run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import on_cpu

ROOT = Path(__file__).parent.parent

pytestmark = on_cpu


@pytest.mark.filterwarnings("default")
def test_demo(tmp_path, capsys):
    multi_mnist = pytest.importorskip("examples.multi_mnist")
    picture = tmp_path / "curves.png"
    runs = multi_mnist.main(["--quick", "--seeds", "2", "--epochs", "1", "--output", str(picture)])
    assert {run.method for run in runs} == {"Plain sum", "PCGrad", "MGDA", "GradNorm"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(0 <= value <= 1 for run in runs for value in run.accuracy)
    assert "plain sum" in capsys.readouterr().out


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
