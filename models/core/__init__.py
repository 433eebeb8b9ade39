"""The behaviour of every looped model, whatever its family.

Start with `family.py`, what a family declares, and `base.py`: `LoopedModel` runs a schedule of
visits with `begin`, `advance` and `readout`. `state.py` and `schedule.py` say where a run stands.
`names.py`, `points.py`, `hooks.py` and `intervene.py` are the hook points of every iteration,
`attention.py` and `cache.py` keys, values and caches, `tokens.py` and `texts.py` the inputs,
`config.py` and `fields.py` the configs. Imports nothing of `blocks` or `families`.
"""
