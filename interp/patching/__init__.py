"""Patching: activations of one run are put into another run, and the effect on the answer is
measured.

Start with `activation.py`, whose cells either engine runs: `packed.py` many side by side (on
`lanes.py`), `continued.py` one whole run after the other. `paths.py` patches single paths between
`path_ends.py`, `tracing.py` is causal tracing, `sweep.py` the record. Imports `common`.
"""
