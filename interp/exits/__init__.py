"""After which iteration a model would stop: by its answers, its states, or its own gate.

Start with `halting.py`. Imports `common`, `lens` and `dynamics`.
"""
