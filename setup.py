# SPDX-License-Identifier: MIT
"""Builds the optional compiled extension; everything else about the package is in pyproject.toml.

GRADSURGERY_BUILD chooses what is compiled:

    auto  (default) the best that this machine allows: CUDA, else C++, else nothing
    cuda  C++ and CUDA; fails without a C++ compiler, nvcc or a torch that is built with CUDA
    cpu   C++ only; fails without a C++ compiler
    none  nothing: the package runs on its PyTorch backend

A $CXX that cannot compile is an error, except with "none".

TORCH_CUDA_ARCH_LIST chooses the GPUs, as for any extension of torch, from compute capability 8.0 on. The default is all
of ARCHITECTURES below that nvcc knows, and PTX for newer ones.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "cuda", "cpu", "none")
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")  # Ampere, Ada, Hopper, Blackwell
NO_TORCH = """\
gradsurgery: torch cannot be imported, and its compiled extension needs it at build time.
If torch is installed, pip's build isolation hides it:

    pip install torch "setuptools>=77" ninja
    pip install --no-build-isolation .

To install without the extension: GRADSURGERY_BUILD=none pip install ."""


def choose_build() -> str:
    """What to compile: "cuda", "cpu" or "none"."""
    wanted = os.environ.get("GRADSURGERY_BUILD", "auto")
    if not os.environ.get("CXX", "").strip():
        os.environ.pop("CXX", None)  # torch would try to run a compiler with an empty name
    if wanted not in CHOICES:
        sys.exit(f"GRADSURGERY_BUILD must be one of {', '.join(CHOICES)}, got {wanted!r}")
    if wanted == "none":
        return "none"
    try:
        import torch
    except ImportError:
        sys.exit(NO_TORCH)
    windows = "on Windows torch builds with MSVC, which the sources are not for" if sys.platform == "win32" else ""
    no_compiler = windows or complaint()
    why_not = {"cpu": no_compiler, "cuda": no_compiler or why_not_cuda()}
    if no_compiler and "CXX" in os.environ and not windows:
        sys.exit(f"gradsurgery: $CXX is of no use: {no_compiler}")
    if wanted == "auto":
        # With a torch for the CPU only, nobody expects CUDA kernels: no message about them.
        if reason := no_compiler or (torch.version.cuda and why_not["cuda"]):
            print(f"gradsurgery: {reason}", file=sys.stderr)
        return next((build for build in ("cuda", "cpu") if not why_not[build]), "none")
    if why_not[wanted]:
        sys.exit(f"GRADSURGERY_BUILD={wanted} cannot be met: {why_not[wanted]}")
    return wanted


def compiler() -> list[str]:
    return os.environ.get("CXX", "c++").split()


def complaint(header: str = "cstdint", *flags: str) -> str:
    """Why the compiler does not compile a file that includes a header; empty if it does."""
    given = [flag for name in ("CPPFLAGS", "CXXFLAGS") for flag in os.environ.get(name, "").split()]
    command = [*compiler(), "-std=c++20", *given, *flags, "-fsyntax-only", "-x", "c++", "-"]
    try:
        tried = subprocess.run(command, input=f"#include <{header}>\n", text=True, capture_output=True)
    except OSError:
        return f"{command[0]} was not found"
    return "" if tried.returncode == 0 else f"{command[0]} does not compile #include <{header}>: {tried.stderr.strip()}"


def openmp_flags() -> list[str]:
    """-fopenmp if the compiler has OpenMP: at::parallel_for is OpenMP code in a header, else it runs on one thread."""
    why = complaint("omp.h", "-fopenmp")
    if not why:
        return ["-fopenmp"]
    print(f"gradsurgery: kernels for the CPU will run on one thread:\n{why}", file=sys.stderr)
    return []


def why_not_cuda() -> str:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, include_paths

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if nvcc() is None:
        return "no nvcc was found, in $CUDA_HOME or elsewhere"
    said = subprocess.run([nvcc(), "--version"], text=True, capture_output=True).stdout
    release = re.search(r"release ((\d+)\.\d+)", said)
    if release is None or release[2] != torch.version.cuda.split(".")[0]:
        return f"{nvcc()} is of CUDA {release[1] if release else '(unknown)'}, torch of CUDA {torch.version.cuda}"
    why = complaint("cuda_runtime_api.h", *(f"-I{path}" for path in include_paths("cuda")))
    # If nvcc is a link or a script, torch may take the wrong folder for the toolkit's.
    return why and f"{why}\nIf {CUDA_HOME} is not the CUDA toolkit's folder, set CUDA_HOME to that."


def nvcc() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    return shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else None


def choose_architectures() -> None:
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    # Names of architectures are left to torch. Numbers below 8 are dropped: no float64 matrix instruction there.
    served = [a for a in wanted if a and (not a[0].isdigit() or int(a.split(".")[0]) >= 8)]
    if any(wanted) and not served:
        sys.exit(f"TORCH_CUDA_ARCH_LIST must hold 8.0 or later, got {';'.join(wanted)}")
    if served:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(served)
    else:
        known = subprocess.run([nvcc(), "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
        mine = [a for a in ARCHITECTURES if f"compute_{a.rstrip('a').replace('.', '')}" in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(mine) + "+PTX"


def extension_arguments(build: str) -> dict:
    if build == "none":
        if "editable_wheel" in sys.argv:  # an editable install would still use the library of an earlier build
            for library in ROOT.glob("gradsurgery/_C*.so"):
                library.unlink()
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    folders = ["csrc/*.cpp", "csrc/cpu/*.cpp"] + (["csrc/cuda/*.cu"] if build == "cuda" else [])
    sources = sorted(str(path.relative_to(ROOT)) for folder in folders for path in ROOT.glob(folder))
    if not sources:
        sys.exit(f"gradsurgery: there is nothing to compile in {ROOT / 'csrc'}")
    patterns = ("*.h", "*.inl", "*.cuh")
    headers = [str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(f"csrc/**/{pattern}")]
    openmp = openmp_flags()
    # A caller's -ffast-math would remove the handling of NaN, and -fstrict-enums the checks for invalid enum values.
    exact = ["-fno-fast-math", "-fno-strict-enums", "-ffp-contract=fast"]
    flags = ["-O3", "-std=c++20", *exact, "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-g0", *openmp]
    if build == "cuda":
        choose_architectures()
    make_extension = CUDAExtension if build == "cuda" else CppExtension
    extension = make_extension(
        name="gradsurgery._C",
        sources=sources,
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc" / "include")],
        depends=headers,
        # Exports no functions: exported ones would be replaced by those of the same names in another library.
        define_macros=[("GS_API", ""), *([("GS_WITH_CUDA", None)] if build == "cuda" else [])],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden"]},
        extra_link_args=openmp,
    )

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # without ninja, objects of a different build would count as up to date

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


build = choose_build()
print(f"gradsurgery: compiling {build}", file=sys.stderr)
setup(**extension_arguments(build))
