"""Activations on disk: collected from any number of texts, read by visit, by iteration or by token.

Start with `collect.py`, which writes a store, and `reading.py`, which reads one. `texts.py` holds
the sources of texts, `pieces.py` what is run at once, `groups.py` which visits share a file,
`files.py` the files, `export.py` other formats. Imports `common` and `shards`.
"""
