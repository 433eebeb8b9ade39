"""The behaviour of every looped model, whatever its family.

Start with `family.py`, what a family declares, and `base.py`: `LoopedModel` runs a schedule of
visits with `begin`, `advance` and `readout`. `state.py` and `schedule.py` say where a run stands.
`points.py`, `hooks.py` and `intervene.py` are the hook points of every iteration, `attention.py`
and `cache.py` keys, values and caches, `texts.py` the inputs, `config.py` the configs. Imports
`basis`.
"""
