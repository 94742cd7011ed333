# SPDX-License-Identifier: MIT
"""The test modules that conftest.py names exist."""

from pathlib import Path

import conftest


def test_modules_that_are_named_are_there():
    assert {*conftest.FIRST, *conftest.SOLVERS} <= {path.stem for path in Path(__file__).parent.glob("test_*.py")}
