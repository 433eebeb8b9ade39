"""The figures of one checkpoint on one page.

Start with `page.py`.
"""
