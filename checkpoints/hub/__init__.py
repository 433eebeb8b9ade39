"""Releases that are fetched: `repository.py` brings repositories of the Hugging Face hub,
`drive.py` runs from Google Drive, and `fetched.py` finds what has been brought.
"""
