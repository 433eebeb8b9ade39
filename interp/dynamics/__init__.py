"""How the recurrent state moves over iterations: steps, angles, orbits, attention, Jacobians.

Start with `states.py`. Imports `common` and `lens`.
"""
