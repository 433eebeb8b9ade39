"""Estimates of how much each activation or component matters: gradients, attribution patching,
direct logit attribution.

Start with `gradients.py`. Imports `common` and `patching`, whose record of a sweep it returns.
"""
