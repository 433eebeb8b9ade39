"""The atlas: claims of papers about looped models, asked of the shipped miniatures.

Start with `rules.py`, which holds what is asked and when it counts as shown; the other files
measure.
"""
