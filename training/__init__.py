"""Recipes that make checkpoints: recurrence sampling, curricula, resume, export.

Start with `trainer.py`; `recipes.py` says what a run is, `catalog.py` names the runs of the paper
and the miniatures, `runs.py` runs one by its name, `language/` trains on strings of molecules.
Imports `tasks`, `models`, `checkpoints` and `interp`.
"""

from loopscope._one_name import refuse_second_name

refuse_second_name(__name__)
