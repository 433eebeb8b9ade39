"""Next-token training of a looped language model on strings of molecules.

Start with `trainer.py`; `recipes.py` holds the runs, `data.py` their rows of tokens, `scores.py`
how well a model writes.
"""
