"""Circuits found by the machine: the edges between components of all iterations that carry an answer.

Start with `record.py`, the circuit as it is saved. `graph.py` says which nodes and edges a model has.
Imports `common` and `attribution`.
"""
