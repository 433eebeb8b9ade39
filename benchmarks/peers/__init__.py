"""The same question to every tool: write one value at one call of a block, and read the logits.

`python -m benchmarks.peers` asks each tool that is installed in a process of its own, compares its
answers with plain hooks that count their calls, and writes docs/peers.md. `cases.py` has the looped
modules, `tools.py` how each tool is asked.
"""
