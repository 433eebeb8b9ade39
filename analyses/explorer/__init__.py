"""A local page on which one asks a checkpoint, watches the iterations, and patches with a click.

Start with `app.py`; `model.py` computes, `view.py` draws, `page.py` says where things stand, and
`callbacks.py` ties them to the controls. `circuit.py` and `features.py` are parts of the page. The
page of a Sudoku solver's boards is in `boards/`.
"""
