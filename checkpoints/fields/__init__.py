"""Knowledge of the fields of released configs: `harmless.py` lists those that never change a
result.
"""
