# SPDX-License-Identifier: MIT
"""Benchmarks; NOTES.md lists them."""
