"""The recursive puzzle solvers TRM and HRM: start with `solver.py`, the cycles and supervision
steps that both share; `config.py` has their sizes, `trm.py` and `hrm.py` say what is their own,
`position_mlp.py` mixes positions where TRM has no attention.
"""
