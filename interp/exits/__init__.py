"""Rules for stopping early: by the model's answers, its states, or its own exit gate.

Start with `halting.py`. Imports `common`, `lens` and `dynamics`.
"""
