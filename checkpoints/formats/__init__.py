"""The formats that `load` opens, one file each: a format says whether a located checkpoint is its
own, and opens it.

Start with `base.py`. `own.py` is the project's format, `released_folder.py` a released config.json
with weights, `whole_pickle.py` a pickle that holds config and weights, `paper.py` the bare pickles
of "Loop, Think, & Generalize".
"""
