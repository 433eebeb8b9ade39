"""First-order estimates: gradients, attribution patching, direct logit attribution.

Start with `gradients.py`. Imports `common` and `patching`, whose cells and records it shares.
"""
