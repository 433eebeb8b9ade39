"""Inkling-2-Mini: start with `model.py`, the config and how passes hand messages on; `block.py` is
one layer, `attention.py` and `mixing.py` are its parts.
"""
