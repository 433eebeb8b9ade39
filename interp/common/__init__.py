"""The ground that all methods share: inputs, places in a run, columns, collected activations,
metrics, modes, processes.

Start with `inputs.py` (a batch, texts, or tokens with a readout column) and `places.py` (where in a
run). Imports no other room.
"""
