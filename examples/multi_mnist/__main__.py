# SPDX-License-Identifier: MIT
"""Entry point of ``python -m examples.multi_mnist``."""

from . import main

main()
