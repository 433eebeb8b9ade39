"""Interventions as context managers: ablate a component, steer or replace activations.

Start with `ablation.py`. Imports `common`.
"""
