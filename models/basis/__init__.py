"""The ground below the models: names of hook points, tokens and batches, checked fields, files.

Start with `tokens.py`, whose `Batch` every method takes. Imports nothing else of this project.
"""
