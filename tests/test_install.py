# SPDX-License-Identifier: MIT
"""The package without its extension, and what setup.py says when it cannot build."""

import ctypes
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch.utils.cpp_extension

import gradsurgery
from conftest import needs_extension, on_cpu
from gradsurgery import _extension
from gradsurgery.backends import native

ROOT = Path(__file__).parent.parent

pytestmark = on_cpu


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
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # plain PyTorch is faster
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "the compiled extension is not there" in result.stdout.splitlines()[1]
    assert "circular" not in result.stdout


def test_an_extension_that_cannot_be_loaded_is_not_dropped_unsaid(monkeypatch):
    def fails(name):
        raise ImportError("undefined symbol: aoti")

    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.warns(UserWarning, match=r"cannot be loaded, so build it again .*\(undefined symbol: aoti"):
        found = runpy.run_path(str(ROOT / "gradsurgery/_extension.py"))
    assert found["C"] is None


def run(choice, command, monkeypatch):
    """Run setup.py in this process, which has torch already: importing it takes seconds."""
    monkeypatch.setenv("GRADSURGERY_BUILD", choice)
    monkeypatch.setattr(sys, "argv", ["setup.py", *command.split()])
    runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")


@pytest.fixture
def compiled(monkeypatch, capfd):
    """Return a function that runs setup.py and returns what setup.py says that it compiles."""

    def run_setup(choice: str) -> str:
        run(choice, "--version", monkeypatch)
        printed = capfd.readouterr()
        assert printed.out.split() == [gradsurgery.__version__]
        return re.search("^gradsurgery: compiling (.*)$", printed.err, re.MULTILINE)[1]

    monkeypatch.chdir(ROOT)
    # setup.py sets this variable.
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    return run_setup


def without_torch(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "torch", None)


def without_compiler(monkeypatch, folder):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))


def with_mistyped_compiler(monkeypatch, folder):
    monkeypatch.setenv("CXX", str(folder / "absent"))


def without_cuda(monkeypatch, folder):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)


def without_nvcc(monkeypatch, folder):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(folder))


def with_cuda(monkeypatch, folder, release="13.0", header="cuda_runtime_api.h"):
    without_nvcc(monkeypatch, folder)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    for name, text in {
        "bin/nvcc": f"#!/bin/sh\necho release {release}, compute_75 compute_80 compute_90",
        f"include/{header}": "",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)


def with_older_cuda(monkeypatch, folder):
    with_cuda(monkeypatch, folder, release="12.4")


def with_nvcc_alone(monkeypatch, folder):
    with_cuda(monkeypatch, folder, header="other.h")


def a_compiler(monkeypatch, folder, script):
    compiler = folder / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def with_older_compiler(monkeypatch, folder):
    a_compiler(monkeypatch, folder, 'case "$*" in *c++20*) echo unknown >&2; exit 1;; esac')
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def with_broken_compiler(monkeypatch, folder):
    a_compiler(monkeypatch, folder, "echo no licence >&2\nexit 1")


def without_a_name(monkeypatch, folder):
    monkeypatch.setenv("CXX", " ")


def on_windows(monkeypatch, folder):
    monkeypatch.setattr(sys, "platform", "win32")


def as_it_is(monkeypatch, folder):
    pass


@pytest.mark.parametrize(
    ("machine", "choice", "message"),
    [
        (as_it_is, "fast", "GRADSURGERY_BUILD must be one of auto, cuda, cpu, none, got 'fast'"),
        (without_torch, "auto", "pip install --no-build-isolation ."),
        (without_cuda, "cuda", "is built without CUDA"),
        (without_nvcc, "cuda", "GRADSURGERY_BUILD=cuda cannot be met: no nvcc"),
        (with_older_cuda, "cuda", "bin/nvcc is of CUDA 12.4, torch of CUDA 13.0"),
        (with_nvcc_alone, "cuda", "does not compile #include <cuda_runtime_api.h>"),
        (with_nvcc_alone, "cuda", "is not the CUDA toolkit's folder, set CUDA_HOME"),
        (without_compiler, "cpu", "GRADSURGERY_BUILD=cpu cannot be met: c++ was not found"),
        (without_compiler, "cuda", "GRADSURGERY_BUILD=cuda cannot be met: c++ was not found"),
        (
            with_older_compiler,
            "cpu",
            "GRADSURGERY_BUILD=cpu cannot be met: c++ does not compile #include <cstdint>: unknown",
        ),
        (on_windows, "cpu", "GRADSURGERY_BUILD=cpu cannot be met: on Windows torch builds with MSVC"),
        (with_mistyped_compiler, "auto", "$CXX is of no use: "),
        (with_broken_compiler, "auto", "c++ does not compile #include <cstdint>: no licence"),
    ],
)
def test_a_build_that_cannot_be(machine, choice, message, compiled, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match=re.escape(message)):
        compiled(choice)


@pytest.mark.parametrize(
    ("machine", "choice", "expected"),
    [
        (without_torch, "none", "none"),
        (without_compiler, "auto", "none"),
        (with_older_compiler, "auto", "none"),
        (with_mistyped_compiler, "none", "none"),
        (on_windows, "auto", "none"),
        (without_a_name, "cpu", "cpu"),
        (as_it_is, "cpu", "cpu"),
        (without_cuda, "auto", "cpu"),
        (with_older_cuda, "auto", "cpu"),
        (with_nvcc_alone, "auto", "cpu"),
        (with_cuda, "auto", "cuda"),
        (with_cuda, "cuda", "cuda"),
    ],
)
def test_what_gets_compiled(machine, choice, expected, compiled, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path)
    assert compiled(choice) == expected
    # The architectures that nvcc knows.
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == ("8.0;9.0a+PTX" if expected == "cuda" else "")


@pytest.mark.parametrize("has_openmp", [True, False])
def test_compilers_without_openmp(has_openmp, monkeypatch, capfd, tmp_path):
    fails = "" if has_openmp else 'case "$*" in *openmp*) exit 1;; esac'
    a_compiler(monkeypatch, tmp_path, f'echo "$@" >&2\n{fails}')
    monkeypatch.chdir(ROOT)
    extensions = []
    monkeypatch.setattr(setuptools, "setup", lambda ext_modules, cmdclass: extensions.extend(ext_modules))
    run("cpu", "--version", monkeypatch)
    assert ("will run on one thread:" in capfd.readouterr().err) == (not has_openmp)
    (extension,) = extensions
    assert ("-fopenmp" in extension.extra_compile_args["cxx"]) == has_openmp
    assert extension.extra_link_args == ["-fopenmp"] * has_openmp


@pytest.mark.parametrize(("command", "left"), [("editable_wheel", []), ("bdist_wheel", ["_C.so"])])
def test_an_editable_install_without_the_extension_removes_an_earlier_one(command, left, monkeypatch, tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "gradsurgery").mkdir()
    (tmp_path / "gradsurgery" / "_C.so").touch()
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(setuptools, "setup", lambda: None)
    run("none", command, monkeypatch)
    assert [path.name for path in (tmp_path / "gradsurgery").iterdir()] == left


def test_the_compiler_is_tried_with_the_flags_that_it_will_get(compiled, monkeypatch, tmp_path):
    with_cuda(monkeypatch, tmp_path, header="elsewhere/cuda_runtime_api.h")
    monkeypatch.setenv("CXXFLAGS", f"-I{tmp_path}/include/elsewhere")
    assert compiled("auto") == "cuda"


def test_why_there_will_be_no_cuda_kernels_is_said(monkeypatch, capfd, tmp_path):
    with_older_cuda(monkeypatch, tmp_path)
    monkeypatch.chdir(ROOT)
    run("auto", "--version", monkeypatch)
    assert "bin/nvcc is of CUDA 12.4, torch of CUDA 13.0\ngradsurgery: compiling cpu" in capfd.readouterr().err


@needs_extension
def test_the_extension_keeps_its_kernels_to_itself():
    library = ctypes.CDLL(_extension.C.__file__)
    assert hasattr(library, "PyInit__C")
    assert not hasattr(library, "gs_version")


@needs_extension
def test_kernels_without_openmp_say_so(monkeypatch):
    described = gradsurgery.backends()["cpu"]
    assert described.endswith(f" threads: {torch.get_num_threads()}")
    monkeypatch.setitem(native._INFO, "parallel", False)
    assert gradsurgery.backends()["cpu"].endswith(" threads: 1, compiled without OpenMP")


@pytest.mark.parametrize(("wanted", "served"), [("7.5 8.6;9.0+PTX", "8.6;9.0+PTX"), ("Hopper", "Hopper")])
def test_gpus_before_ampere_are_left_out(wanted, served, compiled, monkeypatch, tmp_path):
    with_cuda(monkeypatch, tmp_path)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert compiled("cuda") == "cuda"
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == served


def test_only_gpus_before_ampere(compiled, monkeypatch, tmp_path):
    with_cuda(monkeypatch, tmp_path)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must hold 8\.0 or later, got 7\.0"):
        compiled("cuda")


def test_a_source_distribution_holds_all_that_builds_and_tests_it(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    run("none", f"--quiet egg_info --egg-base {tmp_path} sdist --dist-dir {tmp_path}", monkeypatch)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    kinds = ("csrc/**/*.*", "gradsurgery/**/*.py", "tests/**/*.*", "bench/**/*.*", "*.*")
    files = {path.relative_to(ROOT) for kind in kinds for path in ROOT.glob(kind) if path.is_file()}
    ours = {str(path) for path in files if path.suffix not in (".so", ".pyc") and not path.name.startswith(".")}
    assert len(ours) > 200
    assert ours | {".ci/run", ".clang-format", ".pre-commit-config.yaml"} <= names


def test_a_tree_without_sources(compiled, monkeypatch, tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="there is nothing to compile in"):
        compiled("cpu")


def test_versions_agree():
    header = (ROOT / "csrc/include/gradsurgery/gradsurgery.h").read_text()
    assert f'#define GS_VERSION "{gradsurgery.__version__}"' in header
    assert f'version = "{gradsurgery.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"VERSION {gradsurgery.__version__} " in (ROOT / "CMakeLists.txt").read_text()
    assert f"## {gradsurgery.__version__}" in (ROOT / "CHANGELOG.md").read_text()
