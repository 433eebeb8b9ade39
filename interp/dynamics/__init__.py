"""How the recurrent state moves over iterations: steps, angles, orbits, attention, Jacobians,
Lyapunov spectra, attractors.

Start with `states.py`; small changes of a state are those of `changes.py`. Imports `common` and
`lens`.
"""
