"""Training of the recursive puzzle solvers by deep supervision.

`supervision.py` is one supervision step with its loss and its halting; `trainer.py` repeats it by a
recipe of `recipes.py`, on the puzzles of `data.py`, and `scores.py` counts what is solved.
"""
