"""How does a puzzle solver fill a board, how do cells act on each other, and where does it rest?

Start with `sudoku.py`.
"""
