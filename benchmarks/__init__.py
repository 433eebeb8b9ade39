"""Timings that the README quotes: `python -m benchmarks` (or `make bench`) runs them all in one
process.
"""
