# SPDX-License-Identifier: MIT
"""Makes each Python that is started with this folder in PYTHONPATH do without the compiled extension."""

import sys

sys.modules["gradsurgery._C"] = None
