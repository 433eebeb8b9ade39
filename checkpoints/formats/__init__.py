"""The formats that `load` opens, one file each. A format says which checkpoints are its own.

Start with `base.py`. `own.py` is the project's format, `released_folder.py` a released config.json
with weights, `whole_pickle.py` a pickle that holds config and weights, `gguf.py` one file of
llama.cpp's, `paper.py` the bare pickles of "Loop, Think, & Generalize".
"""
