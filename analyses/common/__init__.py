"""Code that all figures share: configs, the checkpoint under study, records and how figures look.

Start with `subject.py`, the checkpoint with its questions, and `records.py`, what every analysis
returns. Imports no other room.
"""
