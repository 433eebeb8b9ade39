"""Releases of ordinary models, whose layers `load(folder, window=(first, last))` loops without
training: one file per kind.

Start with `llama.py`. `looping.py` reads the caller's options, `reach.py` which layers see the last
positions only.
"""
