"""Where in depth and at which positions is the answer carried?

Start with `lens.py`.
"""
