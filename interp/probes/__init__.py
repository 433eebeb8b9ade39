"""Probes: linear readings of the states, each with its controls.

Start with `probe.py`; `transfer.py` carries a probe from one iteration to another, `differences.py`
probes pairs of inputs. `states.py` makes the states, `ridge.py` and `logistic.py` fit, `tasks.py`
holds what is asked. Imports `common`.
"""
