"""What every looped model does, whatever its family.

Start with `base.py`: `LoopedModel` runs a schedule of visits with `begin`, `advance` and `readout`.
`state.py` holds the records of a run, `hooks.py` and `intervene.py` the hook points of every
iteration, `attention.py` and `cache.py` keys and values, `tokens.py` and `texts.py` what goes in,
`registry.py` the list of families. Imports nothing of `blocks` or `families`.
"""
