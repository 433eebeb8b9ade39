"""Changes of weights that have been read, on request: `adapters.py` merges LoRA adapters,
`placing.py` gives them a number format and a device.
"""
