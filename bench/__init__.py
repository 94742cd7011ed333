# SPDX-License-Identifier: MIT
"""Benchmarks: micro-benchmarks of each stage, and one table beside other implementations."""
