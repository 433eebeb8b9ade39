"""How good are the answers, after how many iterations?

Start with `overthinking.py`.
"""
