"""Circuits found by a search: edges between components of all iterations that carry an answer.

Start with `record.py`, the circuit as it is saved. `building.py` makes the graph of a model, over
all positions or by position; `scores.py` scores all edges, `selection.py` chooses,
`faithfulness.py` evaluates by `masked.py` and `measured.py`, `search.py` is the exact search.
Imports `attribution` and `common`.
"""
