"""How were the answers learned? Figures drawn from training logs.

Start with `grokking.py`.
"""
