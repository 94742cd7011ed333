# SPDX-License-Identifier: MIT
"""The code in README and docs runs, and their links, tables and make targets are right."""

import re
from pathlib import Path

import pytest
import torch._functorch.config as functorch_config

import gradsurgery
from conftest import on_cpu

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


# The blocks of each page, README included, are one program.
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/*.md")))]


@on_cpu
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page, capsys, monkeypatch, tmp_path):
    if "torchjd" in page:
        pytest.importorskip("torchjd")
    monkeypatch.chdir(tmp_path)
    # The environment of a single process, as torchrun sets it.
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    with functorch_config.patch(donated_buffer=True):  # restored afterwards, as a page sets it
        for number, block in enumerate(blocks):
            exec(compile(block, f"{page} block {number}", "exec"), namespace)
    if page == "README.md":
        assert "tensor([" in capsys.readouterr().out
    assert (len(blocks) >= 2) == (page not in ("docs/c-and-cpp.md", "docs/limits.md", "docs/methods.md"))


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md", "bench/HISTORY.md"])
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]
            assert anchor in anchors, target


def test_the_first_example_is_short():
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert first
    assert len([line for line in first[1].splitlines() if line.strip()]) <= 14


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert named == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


def test_tables_name_every_method_and_backend():
    assert f"implements {len(gradsurgery.methods.available())} such methods" in README
    for method in gradsurgery.methods.available():
        assert f"| `{method}` |" in README
    for backend in gradsurgery.backends():
        assert f"| `{backend}` |" in README
