"""Ordinary models whose middle layers are looped without training (arXiv 2605.23872).

Start with `model.py`; `rules.py` says how a pass moves the state, `cache.py` which keys and values
later tokens see, `reach.py` how far back a layer sees. Bases that are no Llama have a file each.
"""
