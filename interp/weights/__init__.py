"""Circuits in the weights: what heads read, compare and write.

Start with `circuits.py`. Imports `attribution`, whose reading of the final norm it shares.
"""
