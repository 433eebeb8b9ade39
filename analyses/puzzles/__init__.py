"""A puzzle solver under study: its puzzles and its runs, for the figures of puzzles."""
