"""The pictures of records: how figures look, how places and tokens are written, and one drawing
function for each shape of record.

Start with `cells.py` and `curves.py`. Nothing outside this room imports plotly while
`loopscope.interp` is imported: a record's `plot` imports the room when it is called. Imports no
other room.
"""
