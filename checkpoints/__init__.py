"""Where weights come from: release formats, safe loading, our own format, and the shipped checkpoints."""
