"""Interventions as context managers: ablate a component, steer or replace activations, change what
is injected, edit the schedule.

Start with `ablation.py`, whose values come from `substitutes.py`. Imports `common`.
"""
