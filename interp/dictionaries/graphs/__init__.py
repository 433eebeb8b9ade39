"""Graphs of features: what each feature of one input gives to later features and to the answer.

Start with `graph.py`, which makes the `record.py` of one input by the gradients of `local_run.py`.
"""
