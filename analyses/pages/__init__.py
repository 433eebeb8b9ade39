"""Pages of docs/ that are written by commands: claims, findings, families, the gallery.

Start with `replication.py`.
"""
