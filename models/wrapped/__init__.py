"""Modules of other people as looped models: hooks for the length of a run, nothing rewritten.

Start with `wrap.py`. `model.py` is the looped model around a module, `calls.py` one run of it.
Imports `basis` and `core`.
"""
