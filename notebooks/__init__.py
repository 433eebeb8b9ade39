"""Notebooks with their outputs; `python -m notebooks.outputs` runs them and writes the outputs."""
