"""What goes wrong with checkpoints."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded; the message names the file or the tensors that are wrong."""


class SaveError(RuntimeError):
    """A checkpoint that could not be written; the message says what happened on which rank."""
