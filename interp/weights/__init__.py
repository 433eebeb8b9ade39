"""Circuits in the weights, without a run: what heads read, compare and write.

Start with `circuits.py`; the parts of its circuits are in `heads.py`. Imports `common`.
"""
