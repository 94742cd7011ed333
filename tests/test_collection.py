# SPDX-License-Identifier: MIT
"""Which tests conftest.py leaves out."""

import re
from pathlib import Path

import conftest


def test_what_is_left_out_by_name_is_there():
    files = {path.stem: path.read_text() for path in Path(__file__).parent.glob("test_*.py")}
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(files.values()), re.MULTILINE))
    named = {*conftest.INTERPRETED_TASKS, *conftest.INTERPRETED_NEVER, *conftest.INTERPRETED_WHOLE}
    assert {name.partition("[")[0] for name in named} <= defined
    assert {*conftest.FIRST, *conftest.SOLVERS} <= set(files)
