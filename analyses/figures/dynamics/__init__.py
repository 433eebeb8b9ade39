"""How do states and attention patterns move over iterations?

Start with `steps.py`.
"""
