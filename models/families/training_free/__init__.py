"""Ordinary models whose middle layers are looped without training (arXiv 2605.23872).

Start with `model.py`; `rules.py` says how a pass moves the state, `cache.py` which keys and values
later tokens see, `gpt2.py` the one base that is no Llama.
"""
