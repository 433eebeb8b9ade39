"""Predictions from states before the end of a run: logit lens, readout lens, tuned lens,
decodability.

Start with `lens.py`; its record is in `record.py`. Imports `common`.
"""
