"""Puzzles on a board: Sudoku and mazes, with one solution each, and the files of their data sets.

Start with `boards.py` (a puzzle and its tokens); `sudoku.py` and `mazes.py` make puzzles,
`search.py` solves Sudokus, `grades.py` says how hard one is, `files.py` reads and writes them.
"""
