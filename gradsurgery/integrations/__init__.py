# SPDX-License-Identifier: MIT
"""Other libraries' interfaces, one module each. None is imported with gradsurgery itself."""
