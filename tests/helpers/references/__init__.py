"""Families computed slowly, position by position, as their papers and releases say."""
