"""Looped models: each is a program over shared blocks whose hook points exist once per iteration.

`basis` is the ground below, `core` what every model does (start with `core/base.py`: begin,
advance, readout), `blocks` the parts that families are built of, `families` one file per family,
`wrapped` modules of other people, `views.py` the same computation without sharing (`view_parts.py`
has the parts of its TransformerLens model), and `check.py` the trial of what a family declares. A
file in `families` that carries the decorator `family` is found by itself. Imports nothing else of
this project.
"""

from importlib import import_module

from loopscope._one_name import refuse_second_name

refuse_second_name(__name__)
import_module("loopscope.models.families")  # after the check, so that no second copy begins to load
