"""Figures of puzzle solvers: boards over cycles, and how cells act on each other.

Each file is a command. Files that begin with an underscore are parts of the others.
"""
