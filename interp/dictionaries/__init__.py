"""Sparse dictionaries of the states over the iterations: one per iteration, one shared by all, a
crosscoder of all iterations at once, or a transcoder of one shared block.

Start with `dictionary.py`, made of the coders of `coder.py`. `reading.py` makes the states, and
`stored.py` takes them from a store; `training.py` trains (each coder by `trainer.py`),
`controls.py` makes what they are compared with, `sae_files.py` reads and writes SAELens's files.
`splice.py` puts a dictionary into a run; `quality.py`, `labels.py`, `attribution.py`, `graphs/`,
`examples.py` and `effects.py` (one feature on its page) ask about its features. Imports
`attribution`, `common`, `probes` and `store`.
"""
