"""The one error that loading and saving raise about a file's content."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the rule and the finding."""
