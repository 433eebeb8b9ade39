"""Ordinary models whose middle layers are looped without training (arXiv 2605.23872).

Start with `window.py`, the schedule; `rules.py` says how a pass moves the state, `cache.py` which
keys and values later tokens see. The bases are Llama and Qwen3 (`model.py`) and GPT-2 (`gpt2.py`).
"""
