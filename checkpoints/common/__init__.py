"""Config fields and key names that the tables of several families read in the same way."""
