"""The behaviour of every looped model, whatever its family.

Start with `base.py`: `LoopedModel` runs a schedule of visits with `begin`, `advance` and `readout`.
`state.py` holds the records of a run, `schedule.py` the order of visits, `hooks.py` and `points.py`
the hook points of every iteration, `attention.py`, `cache.py` and `caching.py` keys, values and
activations, `tokens.py` and `texts.py` texts and tokens, `registry.py` the list of families.
Imports nothing of `blocks` or `families`.
"""
