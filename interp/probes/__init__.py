"""Linear probes of the states, each with its controls.

Start with `probe.py`; `transfer.py` carries a probe from one iteration to another, `differences.py`
probes pairs of inputs. `states.py` makes the states, `kept.py` keeps them in a folder that shards
share, `fits.py` makes the record of them by `ridge.py` or `logistic.py`, `tasks.py` holds what is
asked. Imports `common` and `shards`.
"""
