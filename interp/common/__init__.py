"""Parts that several methods share: inputs, places in a run, metrics, collected activations,
processes.

Start with `inputs.py` (a batch, texts, or tokens with a readout column) and `places.py` (where in a
run). Imports no other room.
"""
