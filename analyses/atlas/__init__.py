"""The atlas: claims of papers about looped models, asked of the shipped miniatures.

Start with `rules.py`, which holds what is asked and when it counts as shown; `puzzle_rules.py` does
so for the puzzle solver. `motion.py`, `reading.py` and `puzzles.py` measure, and `page.py` writes
docs/atlas.md. Imports `pages`, whose claims it shares.
"""
