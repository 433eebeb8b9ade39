"""Methods: lenses, patching, halting, gradients. Pure functions of a model."""
