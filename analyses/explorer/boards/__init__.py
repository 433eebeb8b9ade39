"""The explorer's page of a Sudoku solver: its boards over the iterations, clues that one changes,
and patches of one cell.

Start with `app.py`; `model.py` computes, `view.py` draws, `page.py` says where things stand.
"""
