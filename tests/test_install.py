# SPDX-License-Identifier: MIT
"""The package without its extension, and what setup.py says when it cannot build."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import on_cpu

ROOT = Path(__file__).parent.parent

pytestmark = on_cpu


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_works_without_the_extension():
    code = """
import sys
sys.modules["gradsurgery._C"] = None
import torch, gradsurgery
assert gradsurgery.backends()["cpu"].startswith("the compiled extension is not there"), gradsurgery.backends()
weight = torch.nn.Parameter(torch.ones(3))
optimizer = gradsurgery.PCGrad(torch.optim.SGD([weight], lr=0.1))
optimizer.backward([weight[0] - weight[1], weight[1] - weight[2]])
optimizer.step()
print(gradsurgery.aggregate(torch.tensor([[-4.0, 1, 1], [6, 1, 1]]), "mgda").tolist())
try:
    gradsurgery.gram(torch.ones(2, 2), backend="cpu")
except RuntimeError as error:
    print(error)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "the compiled extension is not there" in result.stdout.splitlines()[1]


SETUP = (
    "import sys, runpy; {before}; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py', run_name='__main__')"
)


NO_COMPILER = "import shutil; shutil.which = lambda name, path=None: None"
WITH_CUDA = (
    "import torch, torch.utils.cpp_extension as extension; torch.version.cuda = {version!r}; "
    "extension.CUDA_HOME = {home!r}"
)


@pytest.mark.parametrize(
    ("before", "choice", "message"),
    [
        ("pass", "fast", "GRADSURGERY_BUILD must be one of auto, cuda, cpu, none, got 'fast'"),
        ("sys.modules['torch'] = None", "auto", "pip install --no-build-isolation ."),
        (WITH_CUDA.format(version=None, home=None), "cuda", "is built without CUDA"),
        (WITH_CUDA.format(version="13.0", home="/nowhere"), "cuda", "GRADSURGERY_BUILD=cuda cannot be met: no nvcc"),
        (NO_COMPILER, "cpu", "GRADSURGERY_BUILD=cpu cannot be met: neither $CXX nor c++ was found"),
        (NO_COMPILER, "cuda", "GRADSURGERY_BUILD=cuda cannot be met: neither $CXX nor c++ was found"),
    ],
)
def test_a_build_that_cannot_be(before, choice, message):
    result = run(SETUP.format(before=before), GRADSURGERY_BUILD=choice)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.parametrize(
    ("before", "choice", "compiled"),
    [
        ("sys.modules['torch'] = None", "none", "none"),
        (NO_COMPILER, "auto", "none"),
        ("pass", "cpu", "cpu"),
        (WITH_CUDA.format(version=None, home=None), "auto", "cpu"),
    ],
)
def test_what_gets_compiled(before, choice, compiled):
    result = run(SETUP.format(before=before), GRADSURGERY_BUILD=choice)
    assert result.returncode == 0, result.stderr
    assert f"gradsurgery: compiling {compiled}" in result.stderr


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_cuda_gets_compiled_for_what_nvcc_knows(tmp_path, choice):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho compute_75 compute_80 compute_90")
    compiler.chmod(0o755)
    code = SETUP.format(before=WITH_CUDA.format(version="13.0", home=str(tmp_path)))
    result = run(
        f"{code}; import os; print(os.environ['TORCH_CUDA_ARCH_LIST'])",
        GRADSURGERY_BUILD=choice,
        CUDA_HOME=str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
    assert "gradsurgery: compiling cuda" in result.stderr
    assert result.stdout.splitlines()[-1] == "8.0;9.0a+PTX"


@pytest.mark.parametrize(
    ("wanted", "compiled"), [("7.5 8.6;9.0+PTX", "8.6;9.0+PTX"), ("Hopper", "Hopper"), ("7.0", None)]
)
def test_gpus_before_ampere_are_left_out(tmp_path, wanted, compiled):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch(0o755)
    code = SETUP.format(before=WITH_CUDA.format(version="13.0", home=str(tmp_path)))
    result = run(
        f"{code}; import os; print(os.environ['TORCH_CUDA_ARCH_LIST'])",
        GRADSURGERY_BUILD="cuda",
        CUDA_HOME=str(tmp_path),
        TORCH_CUDA_ARCH_LIST=wanted,
    )
    if compiled is None:
        assert "TORCH_CUDA_ARCH_LIST must hold 8.0 or later, got 7.0" in result.stderr
    else:
        assert result.stdout.splitlines()[-1] == compiled, result.stderr


def test_versions_agree():
    import gradsurgery

    header = (ROOT / "csrc/include/gradsurgery/gradsurgery.h").read_text()
    assert f'#define GS_VERSION "{gradsurgery.__version__}"' in header
    assert f'version = "{gradsurgery.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"VERSION {gradsurgery.__version__} " in (ROOT / "CMakeLists.txt").read_text()
    assert f"## {gradsurgery.__version__}" in (ROOT / "CHANGELOG.md").read_text()
