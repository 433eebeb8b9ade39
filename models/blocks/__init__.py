"""The parts that families are built of: norms, attention blocks, rotary positions, random states.

Start with `decoder.py`, what most released language models share, and `decoder_block.py`, its
block. A part that only one family uses carries that family's name. Imports `core` alone.
"""
