"""Graphs for viewers of attribution graphs: the JSON of circuit-tracer and of Neuronpedia.

Start with `graph.py`, which writes it; `circuits.py` and `features.py` are one kind of graph each,
`parts.py` is what both are made of. Imports `circuits` and `dictionaries`.
"""
