"""Recipes that make checkpoints: recurrence sampling, curriculum, resume."""
