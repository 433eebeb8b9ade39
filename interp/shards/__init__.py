"""Work that outgrows one process: a list of work items, of which any process does its share, and
the folder in which the results meet.

Start with `work.py`; `manifest.py` says to which call a folder belongs, `share.py` which items a
shard has. Imports `common`.
"""
