"""What all methods share: their inputs, the places in a run that they name, metrics, processes.

Start with `inputs.py` (a batch, texts, or tokens with a readout column) and `cells.py` (the places
that a sweep patches). Imports no other room.
"""
