"""What the model would answer after every visit: logit lens, readout lens, tuned lens,
decodability.

Start with `lens.py`. Imports `common`.
"""
