# SPDX-License-Identifier: MIT
"""Runnable examples."""
