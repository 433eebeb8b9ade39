"""Circuits that are measured by hand, and a model whose circuit is known."""
