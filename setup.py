# SPDX-License-Identifier: MIT
"""Builds the optional compiled extension; everything else about the package is in pyproject.toml.

GRADSURGERY_BUILD chooses what is compiled:

    auto  (default) the best that this machine allows: C++, else nothing
    cuda  fails: the torch operators do not reach the CUDA kernels yet
    cpu   C++ only; fails without a C++ compiler
    none  nothing: the package runs on its PyTorch backend
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CHOICES = ("auto", "cuda", "cpu", "none")
NO_TORCH = """\
gradsurgery: torch cannot be imported, and its compiled extension needs it at build time.
If torch is installed, pip's build isolation hides it. Install torch first, then:

    pip install --no-build-isolation .

To install without the extension: GRADSURGERY_BUILD=none pip install ."""


def choose_build() -> str:
    """What to compile: "cpu" or "none"."""
    wanted = os.environ.get("GRADSURGERY_BUILD", "auto")
    if wanted not in CHOICES:
        sys.exit(f"GRADSURGERY_BUILD must be one of {', '.join(CHOICES)}, got {wanted!r}")
    if wanted == "none":
        return "none"
    if wanted == "cuda":
        sys.exit("GRADSURGERY_BUILD=cuda cannot be met: the torch operators do not reach the CUDA kernels yet")
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.exit(NO_TORCH)
    has_compiler = shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None
    if wanted == "cpu" and not has_compiler:
        sys.exit("GRADSURGERY_BUILD=cpu needs a C++ compiler: neither $CXX nor c++ was found")
    return "cpu" if has_compiler else "none"


def extension_arguments(build: str) -> dict:
    if build == "none":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    headers = [str(path.relative_to(ROOT)) for pattern in ("*.h", "*.inl") for path in ROOT.glob(f"csrc/**/{pattern}")]
    flags = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-g0"]
    # at::parallel_for is OpenMP in a header: without the flag it runs on one thread. Apple's compiler has none.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    extension = CppExtension(
        name="gradsurgery._C",
        sources=sources,
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc" / "include")],
        depends=headers,
        extra_compile_args=flags + openmp,
        extra_link_args=openmp,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


build = choose_build()
print(f"gradsurgery: compiling {build}", file=sys.stderr)
setup(**extension_arguments(build))
